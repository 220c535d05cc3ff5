"""PrimeIntellect verifiers, v1: tasksets, their tool servers and their rewards, without their runtimes.

An episode is written down as their trace, which the task then scores. Tools are called in this process, by the hints
and docstrings that their servers would publish. What needs a box of theirs is refused when the task is loaded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import count
from typing import Any, ClassVar

from pydantic_core import to_json

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import ConfigError, EnvironmentFault, TaskError, ToolError, boundary
from agentopd.types import Message, Split, Task, ToolCall
from agentopd_envs.adapters.foreign import ForeignEnvironment, Gold, adapted, by_content
from agentopd_envs.authoring import ToolEnvironment, unknown_tool
from agentopd_envs.tools import Tool, build_tool, tool


def from_taskset(taskset: Any, name: str, gold: Gold | None = None) -> type[ToolEnvironment]:
    """An environment of a verifiers v1 taskset, with a task for each of its own, divided by their content.

    The outcome is the reward over the sum of the positive weights. ``gold`` is given their task.
    """
    try:
        import verifiers.v1  # noqa: F401
    except ImportError:
        raise ConfigError("tasksets of verifiers need: pip install 'agentopd[verifiers]'") from None
    made = {"version": metadata.version("verifiers"), "_taskset": taskset, "_drawn": [], "_stream": iter(taskset)}
    return adapted(_FromTaskset, name, type(taskset), gold, **made)


class _FromTaskset(ForeignEnvironment, ToolEnvironment):
    _taskset: ClassVar[Any]
    _drawn: ClassVar[list[Any]]
    _stream: ClassVar[Iterator[Any]]

    @classmethod
    def _theirs(cls, index: int) -> Any:
        """Their task of this number; raises ``StopIteration`` past the last."""
        while len(cls._drawn) <= index:
            cls._drawn.append(next(cls._stream))
        return cls._drawn[index]

    @classmethod
    def _rows(cls, split: Split) -> Iterator[tuple[int, Any]]:
        def drawn() -> Iterator[Any]:
            for index in count():
                try:
                    yield cls._theirs(index)
                except StopIteration:
                    return

        return by_content(drawn(), split, lambda theirs: theirs.data.model_dump_json(exclude={"idx"}))

    @classmethod
    def _task(cls, index: int, row: Any) -> Task:
        if needed := _needs_runtime(row):
            raise TaskError(f"{cls.name}, task {index}: {', '.join(needed)} of {type(row).__name__} need a runtime")
        said = row.data.prompt or ""
        prompt = [Message(role="user", content=said)] if isinstance(said, str) else [_ours(item) for item in said]
        if row.data.system_prompt:
            prompt.insert(0, Message(role="system", content=row.data.system_prompt))
        return cls._asking(prompt, {"index": index})

    @classmethod
    def _servers(cls, theirs: Any) -> list[Any]:
        return [*type(cls._taskset).toolsets(cls._taskset.config), *type(theirs).toolsets(theirs.config)]

    @classmethod
    def _offered(cls, task: Task) -> dict[str, Tool]:
        methods = _methods(cls._servers(cls._theirs(task.public["index"])))
        return {name: build_tool(name, tool(method.__func__)) for name, method in methods.items()}

    @classmethod
    def mutating_tools(cls) -> None:  # type: ignore[override]
        """Not known: their servers do not say which tools only read."""

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """Start their trace and a set of tool servers for this episode."""
        opening = await super().reset(task, ctx)
        self._row = self._theirs(task.public["index"])
        with boundary(EnvironmentFault, f"{self.name}: setup of task {task.id!r}"):
            self._trace = _trace(self._row)
            servers = self._servers(self._row)
            for server in servers:
                server._inert_state = self._trace.state  # The state of calls that come by no channel.
                await server.setup()
                await server.setup_task(self._row.data)
        self._methods = _methods(servers)
        for message in opening:
            self._write(message)
        return opening

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer the calls; the task scores the trace once the episode is over."""
        self._write(Message(role="assistant", content=action.text, tool_calls=action.tool_calls), sampled=True)
        result = await super().step(action)
        for index, message in enumerate(result.messages):
            self._write(message, answers=index)
        if result.done or self._turn >= self.task.limits.max_turns:
            self._trace.stop("agent_completed" if result.done else "max_turns")
            self._trace.ok = True
            with boundary(EnvironmentFault, f"{self.name}: rewards"):
                await self._row.score(self._trace)
                scored = self._trace.rewards.values()
                best = sum(reward.weight for reward in scored if reward.weight > 0)
                self._reward = self._trace.reward / best
            rewards = {name: reward.score for name, reward in self._trace.rewards.items()}
            self._metrics = rewards | self._trace.metrics
        return result

    async def call_tool(self, call: ToolCall) -> str:
        """Call a tool of their servers; what it raises is shown to the student, as they do."""
        if call.name not in self._methods:
            raise unknown_tool(call.name, self.tool_schemas(self.task))
        arguments = self._offered(self.task)[call.name].parse(call.arguments)
        try:
            value = self._methods[call.name](**arguments)
            value = await value if inspect.isawaitable(value) else value
        except Exception as exc:
            raise ToolError(str(exc) or type(exc).__name__) from exc
        return value if isinstance(value, str) else to_json(value).decode()

    def _write(self, message: Message, sampled: bool = False, answers: int = 0) -> None:
        from verifiers.v1.graph import MessageNode

        nodes = self._trace.nodes
        parent = len(nodes) - 1 if nodes else None
        fields = _theirs_message(message, self._turn - (message.role == "tool"), answers)
        nodes.append(MessageNode(parent=parent, message=fields, sampled=sampled))


def _trace(theirs: Any) -> Any:
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import AgentInfo, Trace, TraceTask

    task = TraceTask(type=type(theirs).__name__, data=theirs.data, key=theirs.key, hash=theirs.hash)
    return Trace(task=task, agent=AgentInfo(config=AgentConfig()), state=state_cls(type(theirs))())


def _methods(servers: Sequence[Any]) -> dict[str, Any]:
    """The tools of servers by the names that a model is offered."""
    from verifiers.v1.utils.decorators import discover_decorated

    found: dict[str, Any] = {}
    for server in servers:
        prefix = f"{server.server_name}_" if server.server_name else ""
        for method in discover_decorated(server, "tool"):
            found[prefix + (getattr(method, "tool_name", None) or method.__name__)] = method
    return found


def _needs_runtime(theirs: Any) -> list[str]:
    """What of a task runs in a box of theirs, or between the student and its model."""
    from verifiers.v1.task import Task as TheirTask
    from verifiers.v1.utils.decorators import discover_decorated

    needed = [name for name in ("setup", "finalize") if getattr(type(theirs), name) is not getattr(TheirTask, name)]
    needed += ["image"] if theirs.NEEDS_CONTAINER or theirs.data.image else []
    for function in (*theirs.hooks("reward"), *theirs.hooks("metric")):
        runtime = inspect.signature(function).parameters.get("runtime")
        needed += [function.__name__] if runtime is not None and runtime.default is runtime.empty else []
    stops = (*theirs.hooks("stop"), *discover_decorated(theirs, "intercept"))
    return [*needed, *(function.__name__ for function in stops)]


def _ours(message: Any) -> Message:
    from verifiers.v1.types import content_text

    calls = tuple(
        ToolCall(name=call.name, arguments=json.loads(call.arguments))
        for call in getattr(message, "tool_calls", None) or ()
    )
    name = getattr(message, "name", None)
    return Message(role=message.role, content=content_text(message.content), tool_calls=calls, name=name)


def _theirs_message(message: Message, turn: int, answers: int) -> dict[str, Any]:
    """A message of ours as theirs; calls are numbered by turn, so that an answer names its call."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": f"call_{turn}_{index}", "name": call.name, "arguments": json.dumps(call.arguments)}
            for index, call in enumerate(message.tool_calls)
        ]
    if message.role == "tool":
        fields |= {"tool_call_id": f"call_{turn}_{answers}", "name": message.name}
    return fields
