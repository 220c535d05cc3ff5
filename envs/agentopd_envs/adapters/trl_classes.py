"""Environment classes in TRL's style as environments: ``reset``, public methods as tools, ``get_reward``.

The instance owns the reward, so the verdict is what it says, and it has to lie in [0, 1]. What a tool raises is shown
to the student, as TRL does. No gold trajectory is known, so such an environment cannot be certified.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import ConfigError, EnvironmentFault, InfraError, ToolError, boundary
from agentopd.types import JSON, Episode, Message, Source, Split, Task
from agentopd_envs.authoring import ToolEnvironment
from agentopd_envs.splits import split_of
from agentopd_envs.tools import tool


def from_trl(cls: type, rows: Sequence[JSON], name: str) -> type[ToolEnvironment]:
    """An environment of a TRL-style class, with a task for each row of its data set.

    A row holds ``prompt`` (a text or messages) and whatever else ``reset`` takes; ``None`` for an environment that
    writes its own prompt. Rows are divided by their content. Raises ``ConfigError`` for a class that lacks a method.
    """
    methods = dict(inspect.getmembers(cls, predicate=inspect.isfunction))
    for needed in ("reset", "get_reward"):
        if needed not in methods:
            raise ConfigError(f"{cls.__qualname__} has no method {needed!r}, which an environment in TRL's style needs")
    tools = [key for key in methods if not key.startswith("_") and key not in ("reset", "get_reward")]
    members: JSON = {key: tool(mutates=True)(_tool(methods[key])) for key in tools}
    made = {**members, "name": name, "_factory": cls, "_rows": tuple(rows), "__module__": cls.__module__}
    return type(f"{cls.__name__}FromTRL", (_FromTRL,), made)


class _FromTRL(ToolEnvironment):
    _factory: ClassVar[type]
    _rows: ClassVar[tuple[JSON, ...]]
    _reward: float | None

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterator[Task]:
        """The rows of a split, in their order."""
        found = 0
        for index, row in enumerate(cls._rows):
            if found != limit and split_of(row) == split:
                found += 1
                yield cls._task(row, split, seed, index)

    @classmethod
    def _task(cls, row: JSON, split: Split, seed: int, index: int) -> Task:
        said = row.get("prompt") or ""
        prompt = [{"role": "user", "content": said}] if isinstance(said, str) else said
        return Task(
            id=f"{cls.name}/{index}",
            env=cls.name,
            split=split,
            prompt=tuple(Message.model_validate(message) for message in prompt),
            public={"row": row},
            limits=cls.limits,
            seed=seed,
            source=Source(dataset=cls.name, row=str(index)),
        )

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """A new instance; what its ``reset`` returns follows the last message."""
        opening = await super().reset(task, ctx)
        with boundary(EnvironmentFault, f"{self.name}: reset"):
            self._theirs = self._factory()
            added = await _awaited(self._theirs.reset(**task.public["row"]))
        *before, last = opening
        return (*before, last.model_copy(update={"content": last.content + (added or "")}))

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer the calls; the reward is asked for once the episode is over."""
        result = await super().step(action)
        if result.done or self._turn >= self.task.limits.max_turns:
            with boundary(EnvironmentFault, f"{self.name}: get_reward"):
                self._reward = float(await _awaited(self._theirs.get_reward()))
        return result

    def setup(self) -> None:
        """No reward yet."""
        self._reward = None

    def state(self) -> JSON:
        """The reward, None before the end."""
        return {"reward": self._reward}

    @staticmethod
    def score(task: Task, episode: Episode) -> float:
        """What the instance says; an episode that a token limit cut off has no say and is worth 0."""
        reward = episode.final_state.get("reward")
        if reward is None and not episode.stop_reason.truncated and episode.turns:
            raise InfraError("the environment was not asked for its reward")
        return float(reward or 0.0)


def _tool(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: _FromTRL, **arguments: Any) -> Any:
        try:
            return await _awaited(getattr(self._theirs, method.__name__)(**arguments))
        except Exception as exc:
            raise ToolError(str(exc) or type(exc).__name__) from exc

    return call


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
