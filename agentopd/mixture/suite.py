"""Deterministic task streams, and the mixture that draws a batch's prompts from them."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from typing import Any

from agentopd.config.retention import ReplayConfig
from agentopd.config.run import SkillConfig
from agentopd.contracts import Environment
from agentopd.errors import ConfigError
from agentopd.mixture.budget import Watch, evaluated_shares, watched_share, within_budget
from agentopd.mixture.replay import ReplayScores, replay_weights
from agentopd.mixture.unsolved import Unsolved
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
    again: bool = False
    """Whether the student tried this task before and did not solve it."""
    nth: int = 0
    """How often its task comes before it in the batch: an epoch may end, and the next one begin, inside a batch."""


@dataclass(frozen=True)
class Prompts:
    """A batch before it is sampled."""

    drawn: list[Drawn]
    shares: dict[str, float]
    """Every skill's share of the loss."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        drawn = [{**vars(item), "task": item.task.model_dump(mode="json")} for item in self.drawn]
        return {"drawn": drawn, "shares": self.shares}

    @classmethod
    def restored(cls, drawn: Sequence[Mapping[str, Any]], shares: Mapping[str, float]) -> Prompts:
        """The batch of a saved state."""
        return cls([Drawn(**{**item, "task": Task.model_validate(item["task"])}) for item in drawn], dict(shares))


class CoresetStream:
    """A chosen few of a skill's tasks, over and over in a new order each time; seekable like ``TaskStream``."""

    def __init__(self, tasks: Sequence[Task], name: str, seed: int) -> None:
        self._tasks, self._name, self._seed = list(tasks), name, seed
        self.position = 0

    def take(self, num: int) -> list[Task]:
        """The next ``num`` tasks."""
        start = self.position
        self.position += num
        return [self._at(index) for index in range(start, start + num)]

    def seek(self, position: int) -> None:
        """Continue as if ``position`` tasks had been taken."""
        self.position = position

    def _at(self, index: int) -> Task:
        epoch, place = divmod(index, len(self._tasks))
        order = list(range(len(self._tasks)))
        random.Random(f"{self._seed}/coreset/{self._name}/{epoch}").shuffle(order)
        return self._tasks[order[place]]


@dataclass
class MixtureState:
    """What a checkpoint keeps of a mixture."""

    positions: dict[str, int] = field(default_factory=dict)
    credits: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    current: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    share: float | None = None
    budgets: dict[str, float] = field(default_factory=dict)
    watches: dict[str, dict[str, Any]] = field(default_factory=dict)
    replay_positions: dict[str, int] = field(default_factory=dict)
    unsolved: dict[str, dict[str, Any]] = field(default_factory=dict)
    ahead: list[dict[str, Any]] = field(default_factory=list)

    def scores(self) -> ReplayScores:
        """The old skills' scores of then."""
        return ReplayScores(dict(self.base), dict(self.current), dict(self.errors))


class Mixture:
    """Draws each batch: ``1 - share`` from new skills by weight, ``share`` from old skills by replay policy.

    Counts follow the targets by running credit, so the long-run shares are exact and every batch is within one prompt
    of its target. ``assign`` says which skills are new and old from here on.
    """

    def __init__(
        self,
        streams: Mapping[str, TaskStream],
        skills: Sequence[SkillConfig],
        replay: ReplayConfig,
        temperature: float | None = None,
        retry_share: float = 0.0,
    ) -> None:
        self._streams = dict(streams)
        self._weights = {
            skill.name: self._weight(skill, temperature if skill.role == "new" else None) for skill in skills
        }
        self._new = [skill.name for skill in skills if skill.role == "new"]
        self._old = [skill.name for skill in skills if skill.role == "old"]
        self._replay = replay
        self.replay_streams: dict[str, CoresetStream] = {}
        """Where an old skill's prompts come from instead of its own stream."""
        self.scores = ReplayScores()
        self.share = replay.share
        """Total replay share; a guard may raise it. ``budgeted`` goes by ``budgets`` instead."""
        self.budgets: dict[str, float] = {}
        """What each old skill is to have, also where all of them together would exceed ``max_share``."""
        self._watches: dict[str, Watch] = {}
        self._credits = {skill.name: 0.0 for skill in skills}
        self._unsolved = {skill.name: Unsolved(retry_share) for skill in skills if retry_share > 0}
        self._ahead: deque[Prompts] = deque()

    def assign(self, new: Sequence[str], old: Sequence[str]) -> None:
        """The skills to train and to replay from here on; skills in neither wait for their stage."""
        self._new, self._old = list(new), list(old)

    def shares(self) -> dict[str, float]:
        """Target share of each skill in a batch; sums to 1."""
        old = self._old_shares()
        left = 1 - sum(old.values())
        total = sum(self._weights[name] for name in self._new)
        return {name: left * self._weights[name] / total for name in self._new} | old

    def react(self, tolerated_drop: float) -> None:
        """Let the budgeted policy answer the latest scores."""
        if not self.is_budgeted:
            return
        watches = {name: self._watch(name) for name in self._old}
        self.budgets |= evaluated_shares(self._wanted(), self._replay, self.scores, watches, tolerated_drop)
        for name, watch in watches.items():
            watch.evaluated(self.scores.loss(name))

    def observe(self, outcomes: Mapping[str, Sequence[float]], tolerated_drop: float) -> dict[str, float]:
        """Let the budgeted policy see the mean outcomes of a step's replayed prompts, by skill.

        Returns how far below its reference each skill is of which they say enough; its share may have moved.
        """
        if not self.is_budgeted:
            return {}
        gaps, shares = {}, self._wanted()
        for name in self._old:
            watch = self._watch(name)
            watch.observe(outcomes.get(name, ()))
            found = watch.gap(self.scores.base.get(name), tolerated_drop)
            if found is not None:
                gaps[name], too_far = found
                shares[name] = watched_share(shares[name], watch, too_far, self._replay.max_share)
        if gaps:
            self.budgets |= shares
        return gaps

    @property
    def is_budgeted(self) -> bool:
        """Whether old skills have shares of their own, which move with how they fare."""
        return self._replay.policy == "budgeted" and bool(self._old)

    def _watch(self, name: str) -> Watch:
        return self._watches.setdefault(name, Watch())

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

    def draw(self, num: int) -> list[Drawn]:
        """The next batch of ``num`` prompts, grouped by skill."""
        shares = self.shares()
        active = [name for name in self._credits if name in shares]
        counts = dict.fromkeys(active, 0)
        for name, share in shares.items():
            self._credits[name] += share * num
        for _ in range(num):
            name = max(active, key=lambda skill: self._credits[skill])
            self._credits[name] -= 1.0
            counts[name] += 1
        return list(_counted(item for name in active for item in self._take(name, counts[name])))

    def ahead(self, index: int, num: int) -> Prompts:
        """The batch that is trained on after ``index`` others; it is drawn, of ``num`` prompts, when first asked for.

        What was drawn is part of the state: what is recorded meanwhile would draw other prompts in its place.
        """
        while len(self._ahead) <= index:
            self._ahead.append(Prompts(self.draw(num), self.shares()))
        return self._ahead[index]

    def taken(self) -> None:
        """The first batch of those ahead is being trained on."""
        self._ahead.popleft()

    def record(self, drawn: Sequence[Drawn], tried: Set[str], solved: Set[str]) -> None:
        """Tell which of the prompts ``drawn`` the student tried and which it solved, by their tasks' hashes."""
        for name in self._unsolved.keys() & set(self._new):
            mine = [item.task for item in drawn if item.skill == name and item.task.hash in tried]
            self._unsolved[name].update(mine, solved)

    def state(self) -> MixtureState:
        """Everything needed to continue the same sequence of batches."""
        return MixtureState(
            positions={name: stream.position for name, stream in self._streams.items()},
            credits=dict(self._credits),
            **copy.deepcopy(vars(self.scores)),
            share=self.share,
            budgets=dict(self.budgets),
            watches={name: asdict(watch) for name, watch in self._watches.items()},
            replay_positions={name: stream.position for name, stream in self.replay_streams.items()},
            unsolved={name: unsolved.state() for name, unsolved in self._unsolved.items()},
            ahead=[prompts.state() for prompts in self._ahead],
        )

    def restore(self, state: MixtureState) -> None:
        """Continue from a saved state."""
        for name, position in state.positions.items():
            self._streams[name].seek(position)
        for name, position in state.replay_positions.items():
            self.replay_streams[name].seek(position)
        for name, unsolved in state.unsolved.items():
            self._unsolved[name].restore(**unsolved)
        self._credits = dict(state.credits)
        self.scores = state.scores()
        self.share = self._replay.share if state.share is None else state.share
        self.budgets = dict(state.budgets)
        self._watches = {name: Watch.restored(watch) for name, watch in state.watches.items()}
        self._ahead = deque(Prompts.restored(**prompts) for prompts in state.ahead)

    def _take(self, name: str, num: int) -> list[Drawn]:
        is_old, unsolved = name in self._old, self._unsolved.get(name)
        if is_old and num:
            self._watch(name).replayed = True
        failed = unsolved.take(num) if unsolved and not is_old else []
        again = [Drawn(name, task, replay=False, again=True) for task in failed]
        return again + [Drawn(name, task, is_old) for task in self._stream(name).take(num - len(again))]

    def _stream(self, name: str) -> TaskStream | CoresetStream:
        return self.replay_streams.get(name, self._streams[name]) if name in self._old else self._streams[name]

    def _old_shares(self) -> dict[str, float]:
        if not self._old or self._replay.share == 0:
            return dict.fromkeys(self._old, 0.0)
        if self._replay.policy == "budgeted":
            return within_budget(self._wanted(), self._replay)
        weights = replay_weights(self._old, self._replay, self.scores)
        return {name: self.share * weight for name, weight in weights.items()}

    def _wanted(self) -> dict[str, float]:
        start = max(self._replay.min_share, self._replay.share / len(self._old))
        return {name: self.budgets.get(name, start) for name in self._old}


def _counted(drawn: Iterable[Drawn]) -> Iterator[Drawn]:
    """The prompts of a batch, each with its ``nth``."""
    seen: Counter[tuple[str, str]] = Counter()
    for item in drawn:
        yield replace(item, nth=seen[item.skill, item.task.id])
        seen[item.skill, item.task.id] += 1
