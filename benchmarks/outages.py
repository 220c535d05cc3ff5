"""A served teacher that is killed in every phase of a run and comes back, against a run that it stayed for.

The teacher is ``agentopd serve`` in a process of its own; the run is of the shipped models, real environments, jail and
DeepSpeed. In every step the teacher's process is killed a random moment after a phase began, and started again up to
``AWAY_S`` later, the first time after minutes. The run may wait, and must end with the metrics, evaluations, kept
episodes and weights of the undisturbed one. ``outages_noticed`` counts those that the run met and waited for; the
others were over before it asked.

``python -m benchmarks.outages [--rounds 20]``: so many outages in each phase.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentopd.commands import ServeOptions, serve
from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.runs import Run
from agentopd.train import train
from benchmarks import faults

PHASES = faults.PHASES[:-1]
"""A checkpoint does not ask the teacher, and is not written in every step."""
AWAY_S = 2.0


class Server:
    """A teacher's server that can be killed."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["agentopd.commands", "agentopd.teachers.server", "transformers"])
        self.start()

    def start(self) -> None:
        """Begin to serve; returns before it does."""
        options = ServeOptions("micro/teacher", "hf", "auto", "127.0.0.1", self.port)
        self._process = self._context.Process(target=serve, args=(options,), daemon=True)
        self._process.start()

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        self._process.kill()
        self._process.join()


class Outages(logging.Handler):
    """Strike once a step, in a phase drawn from a shuffled deck of them, and hear what the run says of it.

    ``strike`` does so, and returns once it is over; ``said`` is what the run's warnings of it contain.
    """

    def __init__(
        self, run: Run, phases: Sequence[str], strike: Callable[[], None], said: str, rng: random.Random
    ) -> None:
        super().__init__(logging.WARNING)
        self.struck, self.noticed = 0, 0
        self._run, self._phases, self._strike, self._said, self._rng = run, phases, strike, said, rng
        self._deck: list[str] = []
        self._step, self._due = -1, ""
        self._under_way: list[threading.Thread] = []
        for phase in phases:
            self._watch(phase)

    def _watch(self, phase: str) -> None:
        owner, name = faults.beginning(self._run, phase)
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._run.step != self._step:
                self._step = self._run.step
                self._deck = self._deck or self._rng.sample(self._phases, len(self._phases))
                self._due = self._due or self._deck.pop()
            if phase == self._due:
                self._due = ""
                self._under_way.append(threading.Thread(target=self._play))
                self._under_way[-1].start()
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def _play(self) -> None:
        if self._under_way[:-1]:
            self._under_way[-2].join()
        time.sleep(self._rng.uniform(0, faults.SPAN_S))
        self._strike()
        self.struck += 1

    def settle(self) -> None:
        """Wait until the last outage is over."""
        for outage in self._under_way:
            outage.join()

    def emit(self, record: logging.LogRecord) -> None:
        """Count what the run says of them."""
        self.noticed += self._said in record.getMessage()


def played(path: Path, steps: int, overrides: Sequence[str], struck: Callable[[Run], Outages] | None) -> Outages | None:
    """A run at ``path``, with the outages that ``struck`` arms it with."""
    own = (*faults.OVERRIDES, f"train.steps={steps}", f"train.checkpoint_every={steps}", f"run_dir={path}", *overrides)
    run = Run.start(load_run_config(faults.CONFIG, own))
    outages = struck(run) if struck else None
    if outages:
        logging.getLogger("agentopd").addHandler(outages)
    asyncio.run(train(run, make_console(plain=True, stderr=True)))
    if outages:
        logging.getLogger("agentopd").removeHandler(outages)
        outages.settle()
    return outages


def compared(steps: int, overrides: Sequence[str], struck: Callable[[Run], Outages]) -> dict[str, int]:
    """A run with outages against one without: how many there were, and how many files differ in the end."""
    with tempfile.TemporaryDirectory() as folder:
        whole, disturbed = Path(folder) / "whole", Path(folder) / "disturbed"
        played(whole, steps, overrides, None)
        outages = played(disturbed, steps, overrides, struck)
        expected, found = faults.results(whole), faults.results(disturbed)
    differing = [name for name, value in expected.items() if found.get(name) != value]
    print(f"differs in {differing}")
    assert outages is not None
    return {
        "outages": outages.struck,
        "outages_noticed": outages.noticed,
        "steps": steps,
        "differing": len(differing),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="Outages in each phase.")
    parser.add_argument("--longest", type=float, default=150.0, help="Seconds that the first outage lasts.")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    server, rng, lasted = Server(), random.Random(0), list[float]()

    def strike() -> None:
        began = time.monotonic()
        server.kill()
        time.sleep(rng.uniform(0, AWAY_S) if lasted else options.longest)
        server.start()
        lasted.append(time.monotonic() - began)

    teacher = f'teachers.default={{kind = "served", base_url = "http://127.0.0.1:{server.port}"}}'
    try:
        figures = compared(
            options.rounds * len(PHASES), [teacher], lambda run: Outages(run, PHASES, strike, "is away", rng)
        )
    finally:
        server.kill()
    print(json.dumps({**figures, "longest_s": round(max(lasted), 1)}))


if __name__ == "__main__":
    main()
