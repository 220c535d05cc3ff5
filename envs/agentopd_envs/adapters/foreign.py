"""What is common to environments of others: rows are tasks, and their own code says what an episode is worth.

The reward is asked for when an episode ends and kept in its final state, so the verdict is what they said, and stays
so when it is judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeVar

from agentopd.errors import InfraError
from agentopd.types import JSON, Episode, Message, Privileged, Source, Split, Task, Verdict, VerdictStatus
from agentopd_envs.authoring import BaseEnvironment, messages
from agentopd_envs.splits import split_of

Gold = Callable[[Any], Sequence[Message | str]]
"""A row → a trajectory that solves it, written as ``new_task`` takes it. Without one there is no certificate."""
C = TypeVar("C", bound="ForeignEnvironment")


class ForeignEnvironment(BaseEnvironment):
    """Base of the adapters: a subclass makes tasks of rows, and sets ``_reward`` (in [0, 1]) when an episode ends."""

    _gold: ClassVar[Gold | None] = None
    _reward: float | None = None
    _metrics: JSON = {}  # noqa: RUF012 (replaced, never changed)

    @classmethod
    def _rows(cls, split: Split) -> Iterable[tuple[int, Any]]:
        """The numbered rows of a split."""
        raise NotImplementedError

    @classmethod
    def _task(cls, index: int, row: Any) -> Task:
        """The task of a row, without id, split, seed and source."""
        raise NotImplementedError

    @classmethod
    def _asking(cls, prompt: Iterable[Message], public: JSON) -> Task:
        """A task with these opening messages."""
        return cls.new_task("", public=public).model_copy(update={"prompt": tuple(prompt)})

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterator[Task]:
        """The rows of a split, in their order."""
        for index, row in islice(cls._rows(split), limit):
            gold = cls._gold(row) if cls._gold else ()
            named = {"id": f"{cls.name}/{index}", "env": cls.name, "split": split, "seed": seed}
            origin = Source(dataset=cls.name, revision=cls.version, row=str(index))
            made = {**named, "source": origin, "privileged": Privileged(trajectory=messages(gold))}
            yield cls._task(index, row).model_copy(update=made)

    def state(self) -> JSON:
        """The reward, None before the end, and what else was measured."""
        return {"reward": self._reward, "metrics": self._metrics}

    @staticmethod
    def score(task: Task, episode: Episode) -> Verdict:
        """What the instance said; an episode that a limit cut off has no say and is worth 0."""
        reward = episode.final_state.get("reward")
        if reward is None:
            if episode.turns and not episode.stop_reason.truncated:
                raise InfraError("the environment was not asked for its reward")
            reward = 0.0
        if not 0.0 <= reward <= 1.0:
            raise InfraError(f"the environment gave {reward}; a reward has to lie in [0, 1]")
        status = VerdictStatus.OK if reward == 1.0 else VerdictStatus.WRONG
        measured = episode.final_state.get("metrics") or {}
        return Verdict(outcome=reward, status=status, reward=reward, components=measured)


def by_content(rows: Iterable[Any], split: Split, core: Callable[[Any], object]) -> Iterator[tuple[int, Any]]:
    """The rows that fall to a split by a hash of ``core(row)``, with their numbers."""
    return ((index, row) for index, row in enumerate(rows) if split_of(core(row)) == split)


def adapted(base: type[C], name: str, theirs: type, gold: Gold | None, **members: Any) -> type[C]:
    """A subclass that belongs to the module of ``gold``, or of their class: a certificate hashes its source file."""
    origin = theirs if gold is None else gold
    held = None if gold is None else staticmethod(gold)
    named = {"name": name, "_gold": held, "__module__": origin.__module__}
    return type(f"{theirs.__name__}Adapted", (base,), {**named, **members})
