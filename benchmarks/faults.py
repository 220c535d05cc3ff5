"""Runs that are struck in every phase and resumed, against one that was left alone: the same files in the end.

A fault strikes from inside a real run (the shipped models, real environments, jail and DeepSpeed), a random moment
after a phase of a step began: a SIGKILL (``kill``), a SIGTERM (``term``), or a disk without a byte left (``disk``: a
small tmpfs of its own, freed again once the run has stopped). One run is struck while it is first evaluated, then once
in every phase, in the steps from the first on, and each time resumed by a new process; the last process ends it.
Nothing may be lost: metrics, evaluations, kept episodes and weights must be those of the undisturbed run, byte for byte
where they hold no times.

python -m benchmarks.faults [--rounds 20] [--kinds kill term disk]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.errors import StorageError
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train

CONFIG = Path(__file__).parents[1] / "configs/quickstart.toml"
PHASES = ("rollout", "verify", "teacher", "update", "checkpoint")
"""Of a step."""
BEFORE = "base"
"""The evaluation before the first step."""
OVERRIDES = (
    f"train.steps={len(PHASES) + 1}", "train.prompts_per_step=3", "rollout.group_size=2", "eval.tasks_per_skill=2",
    "train.checkpoint_every=1", "train.retry_share=0.5", "threads=1", "objective.stages=[]",
    *(f"suite.skills.{name}.num_train_tasks=64" for name in ("math", "repair", "store")),
)  # fmt: skip
SPAN_S = 0.25
"""A fault strikes within this time of the beginning of its phase."""
OF_THE_MACHINE = ("time/", "memory/", "sync/replicas")
"""Metrics that tell of the clock, the memory and how many servers are up, and of nothing that a fault may change."""


BALLAST = "ballast"
"""What fills the disk, beside the run directories."""


def fill(root: Path) -> None:
    """Leave no byte on the disk of a run directory."""
    file = os.open(root.parent / BALLAST, os.O_WRONLY | os.O_CREAT)
    for size in (2**20, 2**12):
        with suppress(OSError):
            while os.write(file, bytes(size)):
                pass
    os.close(file)


STRIKES: dict[str, Callable[[Path], None]] = {
    "kill": lambda root: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda root: os.kill(os.getpid(), signal.SIGTERM),
    "disk": fill,
}
EXIT_CODES = {"kill": -signal.SIGKILL, "term": 0, "disk": os.EX_IOERR}
"""What a process leaves with that was struck."""
SMALL_DISK = 'mount -t tmpfs -o size=400m none "$0" && TMPDIR="$0" exec "$@"'


def beginning(run: Run, phase: str) -> tuple[Any, str]:
    """The part of a run whose method a phase begins with, and the method's name."""
    began: dict[str, tuple[Any, str]] = {
        BEFORE: (run, "evaluate"),
        "rollout": (run.policy.engine, "generate"),
        "verify": (run.judge, "verifier"),
        "teacher": (next(iter(run.teachers.by_key.values())), "score"),
        "update": (run.learner, "step"),
        "sync": (run.policy.engine, "sync_weights"),
        "checkpoint": (run.learner, "save"),
    }
    return began[phase]


@dataclass(frozen=True)
class Fault:
    """What strikes ``delay_s`` after the first call that the phase makes in the step after ``step`` finished ones.

    Calls of the first evaluation are none of the first step.
    """

    phase: str
    step: int
    delay_s: float
    kind: str = "kill"

    def arm(self, run: Run) -> None:
        """Put the fault where the phase begins."""
        owner, name = beginning(run, self.phase)
        original = getattr(owner, name)
        # The update has been counted when the checkpoint begins.
        strikes_at = self.step + (self.phase == "checkpoint")

        def struck(*args: Any, **kwargs: Any) -> Any:
            if run.step == strikes_at and (self.phase == BEFORE or BEFORE in run.evals):
                strike = threading.Timer(self.delay_s, STRIKES[self.kind], (run.root,))
                strike.daemon = True
                strike.start()
            return original(*args, **kwargs)

        setattr(owner, name, struck)


def play(path: Path, fault: Fault | None, *overrides: str) -> None:
    """Start the run at ``path``, or go on with it."""
    begun = (path / "config.toml").is_file()
    settings = [*OVERRIDES, *overrides, f"run_dir={path}"]
    run = Run.resume(path) if begun else Run.start(load_run_config(CONFIG, settings))
    if fault is not None:
        fault.arm(run)
    try:
        asyncio.run(train(run, make_console(plain=True, stderr=True)))
    except StorageError as error:
        print(error, file=sys.stderr)
        sys.exit(os.EX_IOERR)


def in_a_process(path: Path, fault: Fault | None = None, *overrides: str) -> int:
    """The exit code of a process of its own that plays the run; a signal's number, negative, where one ended it."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentopd.train", "agentopd.report", "deepspeed"])
    process = context.Process(target=play, args=(path, fault, *overrides))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def results(path: Path) -> dict[str, Any]:
    """What a run leaves that does not depend on the machine."""
    rows = read_jsonl(path / "metrics.jsonl")
    found: dict[str, Any] = {"weights": (path / "model/model.safetensors").read_bytes()}
    found["metrics"] = [{k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)} for row in rows]
    for file in sorted(path.glob("eval/*.json")):
        found[file.name] = json.loads(file.read_text())
    for file in sorted(path.glob("episodes/*.jsonl")):
        episodes = read_jsonl(file)
        for row in episodes:
            row["episode"].pop("timings")
        found[file.name] = episodes
    return found


def struck_run(path: Path, phases: Sequence[str], rng: random.Random, kind: str = "kill") -> list[str]:
    """A run struck once before its first step and once in each phase, and each time resumed.

    Returns the phases in which it was not lived through as it should be.
    """
    missed = []
    for step, phase in [(0, BEFORE), *enumerate(phases)]:
        if in_a_process(path, Fault(phase, step, rng.uniform(0, SPAN_S), kind)) != EXIT_CODES[kind]:
            missed.append(phase)
        (path.parent / BALLAST).unlink(missing_ok=True)
    if in_a_process(path):
        missed.append("end")
    return missed


def compared(kind: str, rounds: int) -> dict[str, int]:
    """As many runs, struck in an order of phases of their own; how many faults struck, and how many runs end alike."""
    rng, faults, same = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        in_a_process(whole)
        expected = results(whole)
        for index in range(rounds):
            path = Path(folder) / f"struck-{index}"
            missed = struck_run(path, rng.sample(PHASES, len(PHASES)), rng, kind)
            faults += 1 + len(PHASES) - len(missed)
            differing = [name for name, value in expected.items() if results(path).get(name) != value]
            same += not differing
            print(f"{kind}, run {index}: missed {missed}, differs in {differing}", flush=True)
            shutil.rmtree(path)
    return {f"{kind}_runs": rounds, f"{kind}_faults": faults, f"{kind}_equal_runs": same}


def on_a_small_disk(rounds: int) -> dict[str, Any]:
    """The same in a process that sees a tmpfs in the place of its temporary folder, or why it cannot."""
    alone = ["unshare", "--mount", "--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        return {"disk_skipped": "no mount namespace of its own here"}
    ours = [sys.executable, "-m", "benchmarks.faults", "--kinds", "disk", "--here", "--rounds", str(rounds)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*alone, "sh", "-c", SMALL_DISK, folder, *ours], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=STRIKES, default=list(STRIKES))
    parser.add_argument("--here", action="store_true", help="Fill the disk that is here: it had better be a small one.")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    for kind in options.kinds:
        elsewhere = kind == "disk" and not options.here
        figures |= on_a_small_disk(options.rounds) if elsewhere else compared(kind, options.rounds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
