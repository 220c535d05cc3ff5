"""Deterministic task streams, and the mixture that draws a batch's prompts from them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice

from agentopd.config.run import ReplayConfig, SkillConfig
from agentopd.contracts import Environment
from agentopd.errors import ConfigError
from agentopd.mixture.replay import ReplayScores, replay_weights
from agentopd.types import Split, Task

_BLOCK = 64
"""Tasks among which a curriculum chooses the easiest."""
_FINITE_BELOW = 1024
"""Sources with fewer tasks are shuffled anew every epoch; larger ones are streamed in their own order."""


Keep = Callable[[str, Iterator[Task]], Iterator[Task]]
"""(skill, tasks) → the tasks that may be trained on."""


def keep_all(skill: str, tasks: Iterator[Task]) -> Iterator[Task]:
    """Every task."""
    return tasks


def competence(progress: float, start: float) -> float:
    """Share of the tasks on offer: ``sqrt(progress (1 - start^2) + start^2)`` (Platanios et al. 2019, eq. 7)."""
    return min(1.0, math.sqrt(progress * (1 - start**2) + start**2))


class TaskStream:
    """An endless, seekable stream of one skill's tasks; equal seeds give equal streams."""

    def __init__(
        self, env: type[Environment], skill: SkillConfig, seed: int, split: Split = "train", keep: Keep = keep_all
    ) -> None:
        self._env, self._skill, self._seed, self._split, self._keep = env, skill, seed, split, keep
        head = list(islice(self._source(), _FINITE_BELOW))
        if not head:
            dropped = next(iter(self._loaded()), None) is not None
            why = "only tasks that it is evaluated on; see decontamination.action" if dropped else f"no {split} tasks"
            raise ConfigError(f"skill {skill.name!r}: source {skill.source!r} of {skill.env!r} has {why}")
        self._finite = head if len(head) < _FINITE_BELOW else None
        self.position = 0
        self._tail: Iterator[Task] = iter(())
        self.seek(0)

    def take(self, num: int) -> list[Task]:
        """The next ``num`` tasks."""
        tasks = list(islice(self._tail, num))
        self.position += len(tasks)
        return tasks

    def seek(self, position: int) -> None:
        """Continue as if ``position`` tasks had been taken."""
        self._tail = islice(self._staged(self._endless()), position, None)
        self.position = position

    @property
    def size(self) -> int | None:
        """Number of distinct tasks; None where there is no end to them."""
        return len(self._finite) if self._finite is not None else self._skill.num_train_tasks

    def _source(self) -> Iterator[Task]:
        return self._keep(self._skill.name, self._loaded())

    def _loaded(self) -> Iterator[Task]:
        limits = self._skill.limits
        tasks = self._env.load_tasks(self._split, self._skill.source, self._skill.num_train_tasks, self._seed)
        return (task.model_copy(update={"limits": limits}) if limits else task for task in tasks)

    def _endless(self) -> Iterator[Task]:
        if self._finite is None:
            return chain.from_iterable(self._source() for _ in iter(int, 1))
        return chain.from_iterable(self._shuffled(epoch) for epoch in count())

    def _staged(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """The easiest tasks of every block, more of them as more were drawn; all of them without a curriculum."""
        curriculum, drawn = self._skill.curriculum, 0
        while curriculum is not None and drawn < curriculum.tasks:
            block = list(islice(tasks, _BLOCK))
            share = competence(drawn / curriculum.tasks, curriculum.start)
            by_difficulty = sorted(range(len(block)), key=lambda index: self._difficulty(block[index]))
            offered = set(by_difficulty[: math.ceil(share * len(block))])
            yield from (task for index, task in enumerate(block) if index in offered)
            drawn += len(offered)
        yield from tasks

    def _difficulty(self, task: Task) -> float:
        if not hasattr(self._env, "difficulty"):
            raise ConfigError(f"skill {self._skill.name!r}: {self._skill.env!r} has no `difficulty` for a curriculum")
        return float(self._env.difficulty(task))

    def _shuffled(self, epoch: int) -> list[Task]:
        tasks = list(self._finite or ())
        random.Random(f"{self._seed}/{self._skill.name}/{epoch}").shuffle(tasks)
        return tasks


@dataclass(frozen=True)
class Drawn:
    """One prompt of a batch."""

    skill: str
    task: Task
    replay: bool


@dataclass
class MixtureState:
    """What a checkpoint keeps of a mixture."""

    positions: dict[str, int] = field(default_factory=dict)
    credits: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    current: dict[str, float] = field(default_factory=dict)


class Mixture:
    """Draws each batch: ``1 - share`` from new skills by weight, ``share`` from old skills by replay policy.

    Counts follow the targets by running credit, so the long-run shares are exact and every batch is within one prompt
    of its target.
    """

    def __init__(
        self,
        streams: Mapping[str, TaskStream],
        skills: Sequence[SkillConfig],
        replay: ReplayConfig,
        temperature: float | None = None,
    ) -> None:
        self._streams = dict(streams)
        self._new = [skill for skill in skills if skill.role == "new"]
        self._weights = {skill.name: self._weight(skill, temperature) for skill in self._new}
        self._old = [skill.name for skill in skills if skill.role == "old"]
        self._replay = replay
        self.scores = ReplayScores()
        self._credits = {skill.name: 0.0 for skill in skills}

    def _weight(self, skill: SkillConfig, temperature: float | None) -> float:
        if temperature is None:
            return skill.weight
        size = self._streams[skill.name].size
        if size is None:
            raise ConfigError(
                f"suite.temperature needs to know how many tasks skill {skill.name!r} has, and they have no end: set "
                "its num_train_tasks, or use weights"
            )
        return float(size ** (1 / temperature))

    def shares(self) -> dict[str, float]:
        """Target share of each skill in a batch; sums to 1."""
        budget = self._replay.share if self._old else 0.0
        total = sum(self._weights.values())
        shares = {name: (1 - budget) * weight / total for name, weight in self._weights.items()}
        for name, weight in replay_weights(self._old, self._replay, self.scores).items():
            shares[name] = budget * weight
        return shares

    def draw(self, num: int) -> list[Drawn]:
        """The next batch of ``num`` prompts, grouped by skill."""
        counts = dict.fromkeys(self._credits, 0)
        for name, share in self.shares().items():
            self._credits[name] += share * num
        for _ in range(num):
            name = max(self._credits, key=lambda skill: self._credits[skill])
            self._credits[name] -= 1.0
            counts[name] += 1
        return [
            Drawn(name, task, name in self._old)
            for name, count in counts.items()
            for task in self._streams[name].take(count)
        ]

    def state(self) -> MixtureState:
        """Everything needed to continue the same sequence of batches."""
        positions = {name: stream.position for name, stream in self._streams.items()}
        return MixtureState(positions, dict(self._credits), dict(self.scores.base), dict(self.scores.current))

    def restore(self, state: MixtureState) -> None:
        """Continue from a saved state."""
        for name, position in state.positions.items():
            self._streams[name].seek(position)
        self._credits = dict(state.credits)
        self.scores = ReplayScores(dict(state.base), dict(state.current))
