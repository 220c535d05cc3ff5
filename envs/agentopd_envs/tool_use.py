"""Tool use: a small stock table to keep right, or one turn of function calls (BFCL)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field, RootModel

from agentopd.contracts import AssistantTurn, StepResult
from agentopd.errors import ToolError
from agentopd.registry import register_environment
from agentopd.types import JSON, Message, Task, ToolCall, ToolSchema
from agentopd_envs.authoring import TaskLoader, ToolEnvironment, tool_turn, unknown_tool
from agentopd_envs.datasets import bfcl
from agentopd_envs.micro import store as micro
from agentopd_envs.tools import tool

Count = Annotated[int, Field(ge=0)]


class Stock(RootModel[dict[str, Count]]):
    """The database: how many there are of each item."""


@register_environment("tool_use")
class ToolUseEnvironment(ToolEnvironment):
    """A task either brings a database (``public["db"]``, judged by its final state) or its own functions
    (``public["functions"]``, tool schemas; every call is accepted, recorded and judged, and one turn is all there is).
    """

    name = "tool_use"
    loaders: ClassVar[dict[str, TaskLoader]] = {"micro": micro.tasks, "bfcl": bfcl.tasks}
    sources = tuple(loaders)

    @classmethod
    def verifier_for(cls, task: Task) -> str:
        """``calls`` where the calls are the answer, else ``state``."""
        return "calls" if "functions" in task.public else "state"

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """The task's own functions, or the tools of the database."""
        if "functions" in task.public:
            return tuple(ToolSchema.model_validate(function) for function in task.public["functions"])
        return super().tool_schemas(task)

    @classmethod
    def starter_turns(cls, task: Task) -> tuple[Message, ...]:
        """A call of the first tool without arguments, then nothing."""
        return (tool_turn(cls.tool_schemas(task)[0].name), Message(role="assistant"))

    @classmethod
    def wrong_turns(cls, task: Task) -> Iterable[tuple[Message, ...]]:
        """Only reading, a count off by one, the wrong item, one item too many (``micro``)."""
        return micro.wrong_turns(task) if task.source.dataset == micro.SOURCE.dataset else ()

    def setup(self) -> None:
        """Copy the task's database; a task with functions of its own has none."""
        self._stock = Stock.model_validate(dict(self.task.public.get("db", {})))

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer the calls; where they are the answer, the first turn is the last."""
        answer = await super().step(action)
        if "functions" in self.task.public:
            return StepResult(done=True, events=answer.events)
        return answer

    async def call_tool(self, call: ToolCall) -> str:
        """A task's own functions are only recorded: the answer says so and nothing more."""
        if "functions" not in self.task.public:
            return await super().call_tool(call)
        offered = self.tool_schemas(self.task)
        if all(call.name != schema.name for schema in offered):
            raise unknown_tool(call.name, offered)
        return "ok"

    @tool
    def read(self, item: str) -> str:
        """Read the count of an item."""
        self._check(item)
        return str(self._stock.root[item])

    @tool(mutates=True)
    def write(self, item: str, count: Count) -> str:
        """Set the count of an item."""
        self._check(item)
        self._stock.root[item] = count
        return "ok"

    def state(self) -> JSON:
        """The database as it is now."""
        return {"db": dict(self._stock.root)}

    def _check(self, item: str) -> None:
        if item not in self._stock.root:
            raise ToolError(f"no item {item!r}; there is: {', '.join(self._stock.root)}")
