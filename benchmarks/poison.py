"""Episodes that are poisoned in every phase of a run, against a run in which the same episodes are left out by name.

A run of the shipped models, real environments, jail and DeepSpeed. In every step one episode of the student's is
spoilt: a log-prob that the engine gives its tokens (``rollout``), the reward that its verifier finds (``verify``), the
log-probs of its teacher (``teacher``), or its advantage in the learner's tensors (``update``) is not a number. Then the
run is made again with nothing spoilt: an episode of the first and third kind has no evidence, one of the second no
verdict, and one of the last is taken out of the batch. Metrics, evaluations, weights and all other kept episodes must
be the same.

``poisoned`` counts the episodes; ``explained`` those of them that are on disk with a reason that tells of the fault.

python -m benchmarks.poison [--rounds 20]: so many episodes in each phase.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

import agentopd.train
from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.contracts import Evidence, Generation, GenerationRequest, Sandbox, ScoredEpisode, Verifier
from agentopd.errors import InfraError
from agentopd.objective.streams import Batch
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import build_batch, train
from agentopd.types import Episode, Task, Verdict
from benchmarks import faults

PHASES = ("rollout", "verify", "teacher", "update")
NAN, FAULT = math.nan, re.compile(r"\bnan\b|finite")
LEFT_OUT = ("batch/quarantined", "batch/no_evidence")
"""An episode that the fault takes is counted by the first, and one that is taken by name by the second or by none."""


class Victim(NamedTuple):
    """A spoilt episode, by its id, or its place among a step's where the phase knows no ids."""

    step: int
    phase: str
    name: str | int


class Judging:
    """A verifier whose verdict ``found`` has the last word on."""

    def __init__(self, real: Verifier, found: Callable[[Verdict, Episode], Verdict]) -> None:
        self.name, self.needs_sandbox = real.name, real.needs_sandbox
        self._real, self._found = real, found

    async def verify(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Verdict:
        """The ``Verifier`` protocol."""
        return self._found(await self._real.verify(task, episode, sandbox), episode)


class Spoiling:
    """Spoil one episode a step, in a phase drawn from a shuffled deck of them."""

    def __init__(self, run: Run, rng: random.Random) -> None:
        self.victims: list[Victim] = []
        self._run, self._rng, self._deck = run, rng, list[str]()
        teacher = run.teachers.by_key["default"]
        self._generate, self._verifier = run.policy.engine.generate, run.judge.verifier
        self._score, self._learn = teacher.score, run.learner.step
        for owner, name, ours in (
            (run.policy.engine, "generate", self.generate),
            (run.judge, "verifier", self.verifier),
            (teacher, "score", self.score),
            (run.learner, "step", self.learn),
        ):
            setattr(owner, name, ours)

    def _draw(self, phase: str, names: Sequence[str | int]) -> int | None:
        """The place of who is spoilt now, if anybody is."""
        step = self._run.step
        training = [i for i, name in enumerate(names) if isinstance(name, int) or name.startswith(f"{step}/")]
        if len(self.victims) > step or not training:
            return None
        self._deck = self._deck or self._rng.sample(PHASES, len(PHASES))
        if self._deck[-1] != phase:
            return None
        self._deck.pop()
        place = self._rng.choice(training)
        self.victims.append(Victim(step, phase, names[place]))
        return place

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """The engine's answers."""
        made = await self._generate(requests)
        # A session is an episode's id after its place.
        place = self._draw("rollout", [request.session.partition("/")[2] for request in requests])
        if place is not None:
            made[place] = replace(made[place], logprobs=(NAN, *made[place].logprobs[1:]))
        return made

    def verifier(self, skill: str, task: Task) -> Verifier:
        """Who judges."""

        def found(verdict: Verdict, episode: Episode) -> Verdict:
            if self._draw("verify", [episode.id]) is None:
                return verdict
            return Verdict(**{**dict(verdict), "reward": NAN})

        return Judging(self._verifier(skill, task), found)

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """The teacher's evidence."""
        found = await self._score(episodes, top_k)
        place = self._draw("teacher", [episode.id for episode in episodes])
        if place is not None:
            found[place] = replace(found[place], teacher_logprobs=np.full_like(found[place].teacher_logprobs, NAN))
        return found

    def learn(self, batch: Batch) -> dict[str, float]:
        """The update."""
        rows = [row for row in range(batch.num_rows) if batch.policy_N[batch.row_N == row].all()]
        place = self._draw("update", [int(batch.source_B[row]) for row in rows])
        if place is not None:
            spoilt_N = batch.row_N == rows[place]
            batch = replace(batch, advantage_N=torch.where(spoilt_N, NAN, batch.advantage_N))
        return self._learn(batch)


class LeavingOut:
    """Leave out by name whom another run had spoilt."""

    def __init__(self, run: Run, victims: Sequence[Victim]) -> None:
        self._run = run
        self._names = {(step, phase): name for step, phase, name in victims}
        self._verifier, self._learn = run.judge.verifier, run.learner.step
        for owner, name, ours in ((run.judge, "verifier", self.verifier), (run.learner, "step", self.learn)):
            setattr(owner, name, ours)

    def _name(self, phase: str) -> str | int | None:
        return self._names.get((self._run.step, phase))

    def verifier(self, skill: str, task: Task) -> Verifier:
        """Who judges."""

        def found(verdict: Verdict, episode: Episode) -> Verdict:
            # Once: gold that is shown beside a prompt has the name of the prompt's first rollout.
            if episode.id == self._name("verify"):
                del self._names[self._run.step, "verify"]
                raise InfraError("left out")
            return verdict

        return Judging(self._verifier(skill, task), found)

    def build_batch(self, scored: Sequence[ScoredEpisode], *arguments: Any, **options: Any) -> Batch:
        """The batch."""
        names = {self._name("rollout"), self._name("teacher")}
        gone = [item.episode.id in names and not item.anchor for item in scored]
        rest = [replace(item, evidence=None) if out else item for item, out in zip(scored, gone, strict=True)]
        return build_batch(rest, *arguments, **options)

    def learn(self, batch: Batch) -> dict[str, float]:
        """The update."""
        place = self._name("update")
        rest = [row for row, source in enumerate(batch.source_B.tolist()) if source != place]
        return self._learn(replace(batch.select_rows(rest), metrics=batch.metrics))


def begun(path: Path, steps: int) -> Run:
    """The run, before its first step."""
    overrides = (
        *faults.OVERRIDES, f"train.steps={steps}", f"train.checkpoint_every={steps}", f"run_dir={path}",
        "tracking.episodes_per_step=100", "learner.mini_batches=1",
    )  # fmt: skip
    return Run.start(load_run_config(faults.CONFIG, overrides))


def spoilt(path: Path, steps: int) -> tuple[list[Victim], set[str]]:
    """Play the run with its poison; who was spoilt, and the ids of those whose fault is told on disk."""
    run = begun(path, steps)
    spoiling = Spoiling(run, random.Random(0))
    asyncio.run(train(run, make_console(plain=True, stderr=True)))
    told = {row["episode"]["id"] for row in rows_under(path / "quarantine") if FAULT.search(row["reason"])}
    told |= {
        row["episode"]["id"]
        for row in rows_under(path / "episodes")
        if row["verdict"]["status"] == "infra_error" and FAULT.search(row["verdict"]["detail"])
    }
    return spoiling.victims, told


def rows_under(folder: Path) -> list[dict[str, Any]]:
    """All rows of all files."""
    return [row for file in sorted(folder.glob("*.jsonl")) for row in read_jsonl(file)]


def left_out(path: Path, steps: int, victims: Sequence[Victim]) -> None:
    """Play the run without the victims."""
    run = begun(path, steps)
    leaving = LeavingOut(run, victims)
    with patch.object(agentopd.train, "build_batch", leaving.build_batch):
        asyncio.run(train(run, make_console(plain=True, stderr=True)))


def without(found: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """What a run left, but for the episodes of these names and how they were counted."""
    kept = dict(found)
    for name in filter(lambda name: name.endswith(".jsonl"), found):
        rest = [row for row in found[name] if row["episode"]["id"] not in names]
        # The order is that in which kinds were shown in turn, which those left out were part of.
        kept[name] = sorted(rest, key=lambda row: row["episode"]["id"])
    kept["metrics"] = [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in found["metrics"]]
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="Episodes in each phase.")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    steps = options.rounds * len(PHASES)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "spoilt", Path(folder) / "left_out"
        victims, told = spoilt(one, steps)
        left_out(two, steps, victims)
        found, expected = (without(faults.results(path), told) for path in (one, two))
    differing = [name for name, value in expected.items() if found.get(name) != value]
    print(f"differs in {differing}")
    print(json.dumps({"poisoned": len(victims), "explained": len(told), "differing": len(differing)}))


if __name__ == "__main__":
    main()
