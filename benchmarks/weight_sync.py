"""A weight sync to vLLM: whether it is right, how long it takes, and what part of a training step that is.

First the correctness gate, on micro/student in float32: after every sync the engine's log-probs are the learner's, and
the canary stops a sync that leaves the output head or the prefix cache behind. A gate that fails ends the benchmark
with an error. Then the latency of ``sync_weights``, canary included, over rounds in which the learner moved. Then the
same amid long turns, which an update waits for or cuts (``rollout.cut_turns``), in turn: ``cut_vs_waiting`` is the time
of one sync over the other's, ``turns_vs_waiting`` that until the turns have ended. Then a short run of the quickstart:
``share_of_step`` is the median of ``time/sync`` over the step's four phases.

``python -m benchmarks.weight_sync [--engine vllm] [--rounds 10] [--steps 5] [--prompts 48]``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agentopd.build import build_engine
from agentopd.config import load_run_config
from agentopd.config.engines import VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.console import make_console
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.errors import EngineError
from agentopd.models import load_model
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

CONFIG = Path(__file__).resolve().parents[1] / "configs/quickstart.toml"
VLLM: dict[str, Any] = {"max_context": 768, "kv_cache_gb": 0.25, "timeout_s": 3000.0}
PHASES = ("rollout", "teacher", "learner", "sync")
TURNS, TOKENS, BEFORE_S = 8, 500, 0.3
"""Turns that a sync meets, their tokens, and how long they have been under way."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "vllm_servers"), default="vllm")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        print(json.dumps({"skipped": "vLLM is not installed: make test-vllm builds .venv-vllm, which has it"}))
        return
    kind, rounds = options.engine, options.rounds
    figures = {**latency(kind, rounds), **amid_turns(kind, rounds), **share(kind, options.steps, options.prompts)}
    for key, value in figures.items():
        print(f"{key:<24} {value:.6g}")
    print(json.dumps({"engine": kind, **figures}))


def latency(kind: str, rounds: int) -> dict[str, float]:
    """The gate, and seconds of ``rounds`` syncs."""
    model = load_model("micro/student", "float32")
    engine: Any = build_engine(model, RolloutConfig(engine=kind, vllm=VLLMConfig(**VLLM)))
    try:
        gaps, seconds = [], []
        for version in range(1, rounds + 1):
            _move(model)
            started = time.perf_counter()
            gaps.append(engine.sync_weights(version)["sync/canary"])
            seconds.append(time.perf_counter() - started)
        caught = gate(engine, model) if kind == "vllm" else {}
    finally:
        asyncio.run(engine.aclose())
    return {
        "canary_gap": max(gaps),
        **caught,
        **spread("sync_s", seconds),
    }


def amid_turns(kind: str, rounds: int) -> dict[str, float]:
    """A sync amid long turns that cuts them, against one that waits for them."""
    model = load_model("micro/student", "float32")
    ways = ("waiting", "cutting")
    engines: list[Any] = []
    try:
        for way in ways:
            config = RolloutConfig(engine=kind, vllm=VLLMConfig(**VLLM), cut_turns=way == "cutting")
            engines.append(build_engine(model, config))
        met = [[asyncio.run(_met(engine, version)) for engine in engines] for version in range(rounds)]
    finally:
        for engine in engines:
            asyncio.run(engine.aclose())
    syncs = [cut[0] / waited[0] for waited, cut in met]
    turns = [cut[1] / waited[1] for waited, cut in met]
    return {
        "waiting_sync_s": statistics.median(waited[0] for waited, _ in met),
        "cutting_sync_s": statistics.median(cut[0] for _, cut in met),
        **spread("cut_vs_waiting", syncs),
        **spread("turns_vs_waiting", turns),
    }


async def _met(engine: Any, version: int) -> tuple[float, float]:
    """Seconds of a sync amid turns, and seconds from their beginning to the end of the last."""
    params = SamplingParams(max_tokens=TOKENS)
    began = time.perf_counter()
    turns = asyncio.create_task(engine.generate([GenerationRequest((5, 6, 7), params, seed) for seed in range(TURNS)]))
    await asyncio.sleep(BEFORE_S)
    started = time.perf_counter()
    await asyncio.to_thread(engine.sync_weights, version)
    took = time.perf_counter() - started
    await turns
    return took, time.perf_counter() - began


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median, and the lowest and highest."""
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def gate(engine: Any, model: Any) -> dict[str, float]:
    """Syncs that leave something behind must be caught: an output head, a prefix cache."""

    def without_head() -> None:
        checkpoint = engine._sync._checkpoint
        checkpoint.write()
        (checkpoint.path / "lm_head.safetensors").unlink()
        engine._llm.call("collective_rpc", "reload_weights", kwargs={"weights_path": str(checkpoint.path)})
        engine._llm.call("reset_prefix_cache")

    def without_reset() -> None:
        engine._sync.push(engine._llm)

    found = {}
    for name, push in (("head", without_head), ("cache", without_reset)):
        engine.sync_weights(0)
        _move(model)
        found[f"stale_{name}_caught"] = _caught(push, engine)
    engine.sync_weights(0)
    return found


def _caught(push: Callable[[], None], engine: Any) -> float:
    push()
    try:
        engine._check()
    except EngineError:
        return 1.0
    raise SystemExit("a sync that left something behind passed the canary")


@torch.no_grad()
def _move(model: Any) -> None:
    for weight in model.parameters():
        weight.mul_(1.01)


def share(kind: str, steps: int, prompts: int) -> dict[str, float]:
    """The part of a training step's time that syncing takes, in a real run; the first step, which warms up, is left
    out where there are others.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"rollout.engine={kind}",
            *(f"rollout.vllm.{key}={value}" for key, value in VLLM.items()),
            *("objective.stages=[]", f"run_dir={folder}/run", f"train.steps={steps}", "eval.tasks_per_skill=4"),
            *(f"train.prompts_per_step={prompts}", "train.checkpoint_every=none", "tracking.episodes_per_step=0"),
        ]
        run = Run.start(load_run_config(CONFIG, overrides))
        asyncio.run(train(run, make_console(plain=True)))
        rows = read_jsonl(Path(folder) / "run/metrics.jsonl")
    rows = rows[1:] or rows
    shares = [row["time/sync"] / sum(row[f"time/{phase}"] for phase in PHASES) for row in rows]
    return {
        **spread("share_of_step", shares),
        "step_s": statistics.median(sum(row[f"time/{phase}"] for phase in PHASES) for row in rows),
        "steps": float(len(rows)),
    }


if __name__ == "__main__":
    main()
