"""Runs that are killed in every phase and resumed, against one that was left alone: the same files in the end.

Each fault is a SIGKILL from inside a real run (the shipped models, real environments, jail and DeepSpeed), a random
moment after a phase of a step began. One run is killed once in every phase, in the steps from the second on, and each
time resumed by a new process; the last process ends it. Nothing may be lost: metrics, evaluations, kept episodes and
weights must be those of the undisturbed run, byte for byte where they hold no times.

python -m benchmarks.faults [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

CONFIG = Path(__file__).parents[1] / "configs/quickstart.toml"
PHASES = ("rollout", "verify", "teacher", "update", "checkpoint")
OVERRIDES = (
    f"train.steps={len(PHASES) + 1}", "train.prompts_per_step=3", "rollout.group_size=2", "eval.tasks_per_skill=2",
    "train.checkpoint_every=1", "train.retry_share=0.5", "threads=1", "objective.stages=[]",
    *(f"suite.skills.{name}.num_train_tasks=64" for name in ("math", "repair", "store")),
)  # fmt: skip
SPAN_S = 0.25
"""A fault strikes within this time of the beginning of its phase."""
UNTIMED = ("time/", "memory/")


@dataclass(frozen=True)
class Fault:
    """A SIGKILL ``delay_s`` after the first call that the phase makes in the step after ``step`` finished ones."""

    phase: str
    step: int
    delay_s: float

    def arm(self, run: Run) -> None:
        """Put the fault where the phase begins: in front of a method of the run's own part."""
        teacher = next(iter(run.teachers.by_key.values()))
        owner, name = {
            "rollout": (run.policy.engine, "generate"),
            "verify": (run.judge, "verifier"),
            "teacher": (teacher, "score"),
            "update": (run.learner, "step"),
            "checkpoint": (run.learner, "save"),
        }[self.phase]
        original = getattr(owner, name)
        # The update has been counted when the checkpoint begins.
        strikes_at = self.step + (self.phase == "checkpoint")

        def struck(*args: Any, **kwargs: Any) -> Any:
            if run.step == strikes_at:
                threading.Timer(self.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*args, **kwargs)

        setattr(owner, name, struck)


def play(path: Path, fault: Fault | None) -> None:
    """Start the run at ``path``, or go on with it."""
    begun = (path / "config.toml").is_file()
    run = Run.resume(path) if begun else Run.start(load_run_config(CONFIG, [*OVERRIDES, f"run_dir={path}"]))
    if fault is not None:
        fault.arm(run)
    asyncio.run(train(run, make_console(plain=True, stderr=True)))


def in_a_process(path: Path, fault: Fault | None = None) -> int:
    """The exit code of a process of its own that plays the run; a signal's number, negative, where one ended it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentopd.train", "agentopd.report", "deepspeed"])
    process = context.Process(target=play, args=(path, fault))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def results(path: Path) -> dict[str, Any]:
    """What a run leaves that does not depend on the clock."""
    rows = read_jsonl(path / "metrics.jsonl")
    found: dict[str, Any] = {"weights": (path / "model/model.safetensors").read_bytes()}
    found["metrics"] = [{k: v for k, v in row.items() if not k.startswith(UNTIMED)} for row in rows]
    for file in sorted(path.glob("eval/*.json")):
        found[file.name] = json.loads(file.read_text())
    for file in sorted(path.glob("episodes/*.jsonl")):
        episodes = read_jsonl(file)
        for row in episodes:
            row["episode"].pop("timings")
        found[file.name] = episodes
    return found


def struck_run(path: Path, phases: Sequence[str], rng: random.Random) -> list[str]:
    """A run killed once in each phase and resumed; the phases in which it was not lived through as it should be."""
    missed = []
    for step, phase in enumerate(phases, start=1):
        if in_a_process(path, Fault(phase, step, rng.uniform(0, SPAN_S))) != -signal.SIGKILL:
            missed.append(phase)
    if in_a_process(path):
        missed.append("end")
    return missed


def main(rounds: int) -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        in_a_process(whole)
        expected, same, faults = results(whole), 0, 0
        for index in range(rounds):
            path = Path(folder) / f"struck-{index}"
            missed = struck_run(path, rng.sample(PHASES, len(PHASES)), rng)
            faults += len(PHASES) - len(missed)
            differing = [name for name, value in expected.items() if results(path).get(name) != value]
            same += not differing
            print(f"run {index}: missed {missed}, differs in {differing}")
    print(json.dumps({"runs": rounds, "faults": faults, "equal_runs": same}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
