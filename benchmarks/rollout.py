"""Rollouts against what one would otherwise call, on the same student, prompts and lengths.

``vs_hf_generate``: the in-process engine against Hugging Face ``generate``: one turn, prompts in groups of 4, ragged
ends, CPU seconds. ``generate`` returns no log-probs here, ours always does.

``vs_raw_vllm``, where vLLM is installed: whole multi-turn episodes with tools through ``rollout.engine = "vllm"``
against bare calls of the same vLLM for the same turns: every prompt as it was, every length as it came out, round by
round. Environment, rendering and bookkeeping are thus on our side alone. CPU seconds a token of this process and
vLLM's together; ``vs_raw_vllm_without_logprobs`` lets the bare calls leave out the log-probs, which training cannot.
``vs_raw_vllm_wall`` is by the clock, and says little where others use the machine.

``python -m benchmarks.rollout [--prompts 16] [--pairs 5] [--dtype bfloat16]``
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import psutil
import torch

from agentopd.build import Policy, build_engine, build_policy
from agentopd.config.engines import VLLMConfig
from agentopd.config.run import RolloutConfig
from agentopd.contracts import GenerationRequest, SamplingParams
from agentopd.engines.vllm_process import sampling_args
from agentopd.rollout import EpisodeSpec, run_episodes
from agentopd.types import Episode
from agentopd_envs.micro import store
from agentopd_envs.tool_use import ToolUseEnvironment
from benchmarks.harness import Ratio, compare, report

COPIES, NEW = 4, 64
VLLM = VLLMConfig(max_context=768, kv_cache_gb=0.5, timeout_s=3000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    policy = build_policy("micro/student", options.dtype, RolloutConfig())
    ratios = {"vs_hf_generate": vs_hf_generate(policy, options.prompts, options.pairs)}
    figures: dict[str, float] = {}
    if find_spec("vllm") is None:
        print("vLLM is not installed, so there is nothing bare to compare with: make test-vllm builds .venv-vllm")
    else:
        multi_turn, figures = vs_raw_vllm(policy, options.prompts, options.pairs)
        ratios |= multi_turn
    report(ratios, **figures)


def vs_hf_generate(policy: Policy, prompts: int, pairs: int) -> Ratio:
    """One turn of every prompt."""
    tasks = list(islice(store.tasks("train", None, 0), prompts))
    opened = [policy.renderer.open(task.prompt, ToolUseEnvironment.tool_schemas(task)) for task in tasks]
    rows = [ids for ids in opened for _ in range(COPIES)]
    stop = policy.renderer.end_of_turn_ids
    params = SamplingParams(temperature=1.0, max_tokens=NEW, stop_ids=stop)
    requests = [GenerationRequest(tuple(ids), params, seed) for seed, ids in enumerate(rows)]
    longest = max(map(len, rows))
    padded = torch.tensor([[policy.pad_id] * (longest - len(ids)) + ids for ids in rows])
    mask = (torch.arange(longest) >= longest - torch.tensor([[len(ids)] for ids in rows])).long()
    engine: Any = policy.engine

    def ours() -> None:
        engine.generate_now(requests)

    def theirs() -> None:
        with torch.no_grad():
            policy.model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=NEW,
                eos_token_id=list(stop),
                pad_token_id=policy.pad_id,
            )

    return compare("rollout vs transformers generate", ours, theirs, pairs)


def vs_raw_vllm(policy: Policy, prompts: int, pairs: int) -> tuple[dict[str, Ratio], dict[str, float]]:
    """Whole episodes; ratios of tokens a second, by CPU and by the clock."""
    engine: Any = build_engine(policy.model, RolloutConfig(engine="vllm", vllm=VLLM))
    specs = [
        EpisodeSpec(task, ToolUseEnvironment, f"{number}#{copy}", skill="store", seed=COPIES * number + copy)
        for number, task in enumerate(islice(store.tasks("train", None, 0), prompts))
        for copy in range(COPIES)
    ]
    try:
        episodes = asyncio.run(run_episodes(specs, engine, policy.renderer))

        def ours() -> int:
            return _tokens(asyncio.run(run_episodes(specs, engine, policy.renderer)))

        def bare(**changes: Any) -> Callable[[], int]:
            return lambda: _bare(engine._llm, episodes, changes)

        return _against(engine, ours, bare(flat_logprobs=True), bare(logprobs=None), pairs)
    finally:
        engine.close()


def _against(
    engine: Any, ours: Callable[[], int], theirs: Callable[[], int], without: Callable[[], int], pairs: int
) -> tuple[dict[str, Ratio], dict[str, float]]:
    found: dict[str, list[float]] = {"vs_raw_vllm": [], "vs_raw_vllm_wall": [], "vs_raw_vllm_without_logprobs": []}
    speeds = []
    for _ in range(pairs):
        runs = []
        for work in (ours, theirs, without):
            engine._llm.call("reset_prefix_cache")
            runs.append(_seconds_a_token(work))
        (mine, mine_wall), (raw, raw_wall), (plain, _) = runs
        found["vs_raw_vllm"].append(raw / mine)
        found["vs_raw_vllm_wall"].append(raw_wall / mine_wall)
        found["vs_raw_vllm_without_logprobs"].append(plain / mine)
        speeds.append(1 / mine)
    ratios = {
        key: Ratio(f"episodes {key.replace('_', ' ')}", statistics.median(x), min(x), max(x), pairs)
        for key, x in found.items()
    }
    return ratios, {"tokens_per_cpu_s": round(statistics.median(speeds), 1)}


def _bare(llm: Any, episodes: Sequence[Episode], changes: dict[str, Any]) -> int:
    """Sample every turn of ``episodes`` anew, to its own length, all first turns at once, then all second ones."""
    from vllm import SamplingParams as RawParams
    from vllm import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    async def turn(ids: Sequence[int], count: int, name: str) -> int:
        request = GenerationRequest(ids, SamplingParams(max_tokens=count), seed=0)
        args = {**sampling_args(request), "seed": None, **changes}
        params = RawParams(**args, output_kind=RequestOutputKind.FINAL_ONLY)
        outputs = llm.llm.generate(TokensPrompt(prompt_token_ids=list(ids)), params, name)
        (final,) = [output async for output in outputs]
        return len(final.outputs[0].token_ids)

    async def everything() -> int:
        total = 0
        for index in range(max(len(episode.turns) for episode in episodes)):
            due = [_turn(episode, index) for episode in episodes if index < len(episode.turns)]
            names = (f"bare-{time.monotonic_ns()}-{number}" for number in range(len(due)))
            total += sum(await asyncio.gather(*(turn(*one, name) for one, name in zip(due, names, strict=True))))
        return total

    return int(llm.wait(everything()))


def _turn(episode: Episode, index: int) -> tuple[list[int], int]:
    """What the student saw before a turn, and how much it sampled."""
    before = episode.model_copy(update={"turns": episode.turns[:index]})
    return before.token_ids, len(episode.turns[index].token_ids)


def _tokens(episodes: Sequence[Episode]) -> int:
    return sum(episode.num_sampled for episode in episodes)


def _seconds_a_token(work: Callable[[], int]) -> tuple[float, float]:
    """CPU seconds of this process and its children, and by the clock, for each token that ``work`` sampled."""
    cpu, wall = _cpu(), time.perf_counter()
    tokens = work()
    return (_cpu() - cpu) / tokens, (time.perf_counter() - wall) / tokens


def _cpu() -> float:
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [me, *me.children(recursive=True)])


if __name__ == "__main__":
    main()
