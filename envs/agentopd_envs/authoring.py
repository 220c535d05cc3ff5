"""Base classes for environments: write the tasks and the tools, get the protocol.

A subclass of ``ToolEnvironment`` writes ``generate`` (one random task), ``setup`` (the world of one episode), methods
marked ``@tool`` and ``score`` (a number in [0, 1]). ``SingleTurnEnvironment`` needs only
``generate`` and ``score``. Either names a registered verifier in ``verifier`` instead of having a ``score``.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import EnvironmentFault, TaskError, ToolError, boundary
from agentopd.registry import datasets
from agentopd.types import (
    JSON,
    Event,
    Limits,
    MalformedCall,
    Message,
    Privileged,
    Source,
    Split,
    Task,
    ToolCall,
    ToolSchema,
)
from agentopd_envs.adapters import rows
from agentopd_envs.function_verifier import register_score
from agentopd_envs.splits import procedural
from agentopd_envs.tools import Tool, ToolOptions, tools_of
from agentopd_verifiers.changes import since

TaskLoader = Callable[[Split, int | None, int], Iterable[Task]]
"""(split, limit, seed) → tasks."""


class BaseEnvironment:
    """What all environments share: where tasks come from, who judges them, and the trajectories that test them."""

    name: ClassVar[str]
    """Set by ``@register_environment`` where the class does not."""
    version: ClassVar[str] = "1"
    verifier: ClassVar[str] = ""
    """Registry name (or ``file.py:Class``) of the verifier; set by the class itself where it has a ``score``."""
    sources: ClassVar[tuple[str, ...]] = ("micro",)
    """Task sources. ``micro``, the default everywhere, is a procedural one that needs no files."""
    loaders: ClassVar[Mapping[str, TaskLoader]] = {}
    """Sources that are read by a function; any other source is ``generate``'s."""
    row: ClassVar[type[BaseModel] | None] = None
    """The fields from which ``from_row`` makes a task, for data sets that a TOML file describes (``adapters.rows``)."""
    system: ClassVar[str] = ""
    limits: ClassVar[Limits] = Limits()
    chance: ClassVar[float] = 0.0
    """Share of tasks that random valid calls (or guesses) may solve: 0.25 for a choice of four."""
    capabilities: ClassVar[frozenset[str]] = frozenset()
    """Isolation the sandbox must have for this environment: ``net``, ``pid``, …"""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Pure-Python packages that its programs import: the sandbox offers them read-only."""

    task: Task
    ctx: EpisodeContext

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "score" in vars(cls) and "verifier" not in vars(cls):
            cls.verifier = register_score(cls)

    @classmethod
    def generate(cls, rng: random.Random) -> Task:
        """One random task, usually built with ``new_task``; id, split and seed are filled in by ``load_tasks``."""
        raise TaskError(f"environment {cls.name!r} generates no tasks: write `generate`, or give it `loaders`")

    @classmethod
    def from_row(cls, row: Any) -> Task:
        """The task of one row, an instance of ``cls.row``; id, split, seed and source are filled in."""
        raise TaskError(f"environment {cls.name!r} makes no tasks of rows: write `from_row`")

    @classmethod
    def new_task(
        cls,
        prompt: str,
        *,
        public: JSON | None = None,
        hidden: JSON | None = None,
        gold: Sequence[Message | str] = (),
        hint: str = "",
    ) -> Task:
        """A task with this environment's name, system message and limits.

        ``gold`` is a trajectory that solves it: assistant messages, or plain strings for turns without tool calls.
        ``hint`` is for privileged teachers alone.
        """
        opening = (Message(role="system", content=cls.system),) if cls.system else ()
        return Task(
            id="",
            env=cls.name,
            prompt=(*opening, Message(role="user", content=prompt)),
            public=public or {},
            hidden=hidden or {},
            privileged=Privileged(hint=hint, trajectory=messages(gold)),
            limits=cls.limits,
            source=Source(dataset=cls.name),
        )

    @classmethod
    def has_source(cls, source: str) -> bool:
        """Whether a source is one of ``sources``, a ``file.py:loader`` or a TOML file that describes a data set."""
        return source in cls.sources or ":" in source or source.endswith(".toml")

    @classmethod
    def load_tasks(cls, split: Split, source: str, limit: int | None, seed: int) -> Iterable[Task]:
        """Tasks of one split from a named source; see the protocol. Generated tasks are split by their content."""
        if source in cls.loaders:
            return cls.loaders[source](split, limit, seed)
        if source.endswith(".toml"):
            return rows.tasks(cls, Path(source), split, limit, seed)
        if source not in cls.sources:
            registered: TaskLoader = datasets.get(source)
            return registered(split, limit, seed)
        drawn = procedural(cls.generate, _content, split, limit, seed, cls.name)
        return (task.model_copy(update={"id": task_id, "split": split, "seed": seed}) for task_id, task in drawn)

    @classmethod
    def verifier_for(cls, task: Task) -> str:
        """The verifier that judges this task; override where it depends on the task's source."""
        if not cls.verifier:
            raise TaskError(f"environment {cls.name!r} cannot be judged: give it a `verifier` or a `score` function")
        return cls.verifier

    @classmethod
    def gold_turns(cls, task: Task) -> tuple[Message, ...]:
        """Assistant messages that solve the task; () where none is known."""
        return task.privileged.trajectory

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """Assistant messages that hand in the least possible; they must not solve the task."""
        return (Message(role="assistant"),)

    @classmethod
    def difficulty(cls, task: Task) -> float:
        """How hard a task is, on any scale, for curricula: by default the length of its gold trajectory."""
        return float(sum(len(turn.model_dump_json()) for turn in cls.gold_turns(task)))

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[Sequence[Message | str]]:
        """Plausible wrong solutions, written as ``gold`` is; validation holds each to a score below 1."""
        return ()

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """Start on the student view of a task; returns the opening messages."""
        self.task, self.ctx = task, ctx
        with boundary(EnvironmentFault, f"{self.name}: setup of task {task.id!r}"):
            self.setup()
        return task.prompt

    def setup(self) -> None:
        """Build the world of one episode from ``self.task`` (student view) and ``self.ctx.rng``."""

    def state(self) -> JSON:
        """JSON-able snapshot for the verifier: by default a copy of the public attributes that the subclass set."""
        own = {
            key: value for key, value in vars(self).items() if not key.startswith("_") and key not in ("task", "ctx")
        }
        return copy.deepcopy(own)

    async def close(self) -> None:
        """Release resources; idempotent."""


class SingleTurnEnvironment(BaseEnvironment):
    """One question, one answer: the verifier reads the text."""

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """No tools."""
        return ()

    async def step(self, action: AssistantTurn) -> StepResult:
        """The first turn is the last."""
        return StepResult(done=True)


class ToolEnvironment(BaseEnvironment):
    """Tools are methods marked ``@tool``; a turn without calls ends the episode.

    Calls are answered one by one, in order, and recorded as events of kind ``tool_call`` (name, arguments, ok, result,
    mutates, changes), calls that could not be parsed as ``malformed_call``. ``changes`` is what the call changed in
    ``state()``, so that a judge can tell what each step did (``agentopd_verifiers.changes``).
    """

    _tools: ClassVar[dict[str, Tool]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._tools = tools_of(cls)

    def __init__(self) -> None:
        self._turn = 0
        self._finished = False
        self._calls: Counter[str] = Counter()
        self._events: list[Event] = []

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """The schemas of all marked methods, or of those in ``task.tools``."""
        return tuple(tool.schema for tool in cls._offered(task).values())

    @classmethod
    def mutating_tools(cls) -> frozenset[str]:
        """Names of the tools that change the world."""
        return frozenset(name for name, tool in cls._tools.items() if tool.options.mutates)

    @classmethod
    def tool_options(cls) -> dict[str, ToolOptions]:
        """What ``@tool`` says of each tool beside its schema."""
        return {name: tool.options for name, tool in cls._tools.items()}

    @classmethod
    def _offered(cls, task: Task) -> dict[str, Tool]:
        if task.tools is None:
            return cls._tools
        if unknown := [name for name in task.tools if name not in cls._tools]:
            raise TaskError(f"task {task.id!r} offers tool {unknown[0]!r}; {cls.name!r} has: {', '.join(cls._tools)}")
        return {name: cls._tools[name] for name in task.tools}

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer every call of one turn, until one of them ends the episode."""
        self._events = []
        answers: list[Message] = []
        for call in action.tool_calls:
            answers.append(await self._answer(call))
            if self._finished:
                break
        answers += [self._answer_malformed(call) for call in action.malformed]
        done = self._finished or not answers
        self._turn += 1
        return StepResult(messages=() if done else tuple(answers), done=done, events=tuple(self._events))

    async def call_tool(self, call: ToolCall) -> str:
        """Run one call and return what the student is shown; raises ``ToolError`` for the student's mistakes."""
        tool = self._offered(self.task).get(call.name)
        if tool is None:
            raise unknown_tool(call.name, self.tool_schemas(self.task))
        arguments = tool.parse(call.arguments)
        self._calls[call.name] += 1
        if tool.options.budget is not None and self._calls[call.name] > tool.options.budget:
            raise ToolError(f"no calls of {call.name!r} are left; there were {tool.options.budget}")
        with boundary(EnvironmentFault, f"{self.name}: tool {call.name!r}"):
            result = getattr(self, call.name)(**arguments)
            if inspect.isawaitable(result):
                result = await _within(tool.options.timeout_s, call.name, result)
            if result is None:
                return "ok"
            return result if isinstance(result, str) else json.dumps(result)

    def finish(self) -> None:
        """End the episode with the call being answered."""
        self._finished = True

    def record(self, kind: str, **data: Any) -> None:
        """Add an event to the current turn."""
        self._events.append(Event(turn=self._turn, kind=kind, data=data))

    async def _answer(self, call: ToolCall) -> Message:
        tool, changed_since = self._tools.get(call.name), since(self.state())
        validated = None if tool is None else tool.record(call.arguments)  # a tool may change what it is given
        try:
            result, ok = await self.call_tool(call), True
        except ToolError as error:
            result, ok = f"error: {error}", False
        mutates = tool is not None and tool.options.mutates
        changed = changed_since(self.state())
        answer = Message(role="tool", name=call.name, content=result)
        self.record("tool_call", name=call.name, arguments=call.arguments, validated=validated, ok=ok,
                    result=answer.content, mutates=mutates, changes=changed)  # fmt: skip
        return answer

    def _answer_malformed(self, call: MalformedCall) -> Message:
        self.record("malformed_call", raw=call.raw, reason=call.reason)
        return Message(role="tool", content=f"error: malformed tool call: {call.reason}")


def messages(turns: Sequence[Message | str]) -> tuple[Message, ...]:
    """A trajectory with its plain strings as assistant messages."""
    return tuple(Message(role="assistant", content=turn) if isinstance(turn, str) else turn for turn in turns)


def unknown_tool(name: str, offered: Sequence[ToolSchema]) -> ToolError:
    """What the student is told when it calls a tool that it was not offered."""
    return ToolError(f"unknown tool {name!r}; there is: {', '.join(schema.name for schema in offered)}")


def tool_turn(name: str, **arguments: Any) -> Message:
    """An assistant message with one tool call: a step of a gold trajectory."""
    return Message(role="assistant", tool_calls=(ToolCall(name=name, arguments=arguments),))


async def _within(timeout_s: float | None, name: str, result: Awaitable[Any]) -> Any:
    """Await a tool, for ``timeout_s`` at most; the wall limit of the episode passes through."""
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            return await result
    except TimeoutError:
        if deadline.expired():
            raise ToolError(f"{name!r} took longer than {timeout_s:g} s and was stopped") from None
        raise


def _content(task: Task) -> str:
    body = task.model_dump(mode="json", include={"prompt", "public", "hidden"})
    return json.dumps(body, sort_keys=True)
