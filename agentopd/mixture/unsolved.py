"""Tasks that the student has failed, to be tried again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

from agentopd.types import Task

_CAPACITY = 128
"""Tasks kept of each skill: some batches' worth, so that what was failed long ago makes room for what is failed now."""


class Unsolved:
    """One skill's unsolved tasks, the longest untried first.

    Of its prompts a ``share`` is drawn from here while there are any. A kind of task that the student fails more often
    than others is thereby seen more often, in proportion to how often it is failed; no kind needs to be named.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = 0.0
        self._tasks: dict[str, Task] = {}

    def take(self, num: int) -> list[Task]:
        """Those of the skill's next ``num`` prompts that are tried again: ``share num`` in the long run, or fewer."""
        self._credit += self._share * num
        due = int(self._credit)
        self._credit -= due
        taken = list(self._tasks.items())[:due]
        for key, task in taken:
            del self._tasks[key]
            self._tasks[key] = task
        return [task for _, task in taken]

    def update(self, tried: Iterable[Task], solved: Set[str]) -> None:
        """Keep the tasks ``tried`` whose hash is not among the ``solved``; solved ones leave."""
        for task in tried:
            if task.hash in solved:
                self._tasks.pop(task.hash, None)
            else:
                self._tasks.setdefault(task.hash, task)
        for key in list(self._tasks)[: max(0, len(self._tasks) - _CAPACITY)]:
            del self._tasks[key]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        return {"credit": self._credit, "tasks": [task.model_dump(mode="json") for task in self._tasks.values()]}

    def restore(self, credit: float, tasks: Sequence[Any]) -> None:
        """Continue from a saved state."""
        self._credit = credit
        loaded = [Task.model_validate(task) for task in tasks]
        self._tasks = {task.hash: task for task in loaded}
