"""OpenEnv: environments behind a server, one session of it for each episode.

The client is theirs. An action of one text field is what the student writes; any other action is a tool, and the tools
of an MCP environment are its own. Rewards are computed by the server, which nobody here can check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal
from urllib.request import Request, urlopen

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import ConfigError, EnvironmentFault, ToolError, boundary
from agentopd.types import JSON, Message, Split, Task, ToolCall, ToolSchema
from agentopd_envs.adapters.foreign import ForeignEnvironment, Gold, adapted, by_content
from agentopd_envs.authoring import ToolEnvironment, unknown_tool


def from_openenv(
    url: str, rows: Sequence[JSON], name: str, gold: Gold | None = None, reward: Literal["last", "sum"] = "last"
) -> type[ToolEnvironment]:
    """An environment of the OpenEnv server at ``url``, with a task for each row.

    A row holds ``prompt`` (a text; may be left out) and whatever else ``reset`` takes, ``seed`` say; rows are divided
    by their content. An episode is worth the reward of its last step, or the sum of all. Raises ``ConfigError`` where
    there is no such server.
    """
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError:
        raise ConfigError("OpenEnv servers need: pip install 'agentopd[openenv]'") from None
    url = url.rstrip("/")
    action = _ask(url, "schema")["action"]
    fields = {key: value for key, value in action["properties"].items() if key != "metadata"}
    mcp = "tool_name" in fields
    text = len(fields) == 1 and next(iter(fields.values())).get("type") == "string"
    made: JSON = {
        "version": str(_ask(url, "metadata").get("version") or "1"),
        "_connect": staticmethod(lambda: GenericEnvClient(base_url=url)),
        "_data": tuple(rows),
        "_field": next(iter(fields)) if text else None,
        "_mcp": mcp,
        "_schemas": () if text else _tools(url) if mcp else (_act(action, fields),),
        "_total": reward == "sum",
    }
    return adapted(_FromOpenEnv, name, ToolEnvironment, gold, **made)


class _FromOpenEnv(ForeignEnvironment, ToolEnvironment):
    _connect: ClassVar[Any]
    _data: ClassVar[tuple[JSON, ...]]
    _field: ClassVar[str | None]
    _mcp: ClassVar[bool]
    _schemas: ClassVar[tuple[ToolSchema, ...]]
    _total: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self._client: Any = None
        self._rewards: list[float] = []

    @classmethod
    def _rows(cls, split: Split) -> Iterator[tuple[int, JSON]]:
        return by_content(cls._data, split, lambda row: row)

    @classmethod
    def _task(cls, index: int, row: JSON) -> Task:
        prompt = [Message(role="user", content=row["prompt"])] if row.get("prompt") else []
        return cls._asking(prompt, {"row": row})

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """The server's tools; none where the student's text is the action."""
        return cls._schemas

    @classmethod
    def mutating_tools(cls) -> None:  # type: ignore[override]
        """Not known: a schema does not say which tools only read."""

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """Open a session; the first observation follows the prompt."""
        opening = await super().reset(task, ctx)
        arguments = {key: value for key, value in task.public["row"].items() if key != "prompt"}
        self._client = self._connect()
        with boundary(EnvironmentFault, f"{self.name}: reset"):
            first = await self._client.reset(**arguments)
        said = [*(message.content for message in opening), _shown(first.observation)]
        return (Message(role="user", content="\n\n".join(filter(None, said))),)

    async def step(self, action: AssistantTurn) -> StepResult:
        """Act; the reward is what the server gave by the time that the episode is over."""
        if self._field is None:
            result = await super().step(action)
        else:
            self._turn += 1
            answer = Message(role="user", content=_shown(await self._send({self._field: action.text})))
            result = StepResult(done=True) if self._finished else StepResult(messages=(answer,))
        if result.done or self._turn >= self.task.limits.max_turns:
            self._reward = sum(self._rewards) if self._total else (self._rewards or [0.0])[-1]
            self._metrics = {"steps": float(len(self._rewards))}
        return result

    async def call_tool(self, call: ToolCall) -> str:
        """One step of the server."""
        if all(call.name != schema.name for schema in self._schemas):
            raise unknown_tool(call.name, self._schemas)
        if not self._mcp:
            return _shown(await self._send(call.arguments))
        action = {"type": "call_tool", "tool_name": call.name, "arguments": call.arguments}
        observation = await self._send(action)
        if observation.get("error"):
            raise ToolError(str(observation["error"]["message"]))
        return _result(observation["result"])

    async def _send(self, action: JSON) -> JSON:
        try:
            result = await self._client.step(action)
        except RuntimeError as exc:
            if "code: VALIDATION_ERROR" in str(exc):
                raise ToolError("the server refuses these arguments: they do not fit its schema") from None
            raise EnvironmentFault(f"{self.name}: {exc}") from exc
        self._rewards.append(float(result.reward or 0.0))
        if result.done:
            self.finish()
        observation: JSON = result.observation
        return observation

    async def close(self) -> None:
        """Close the session."""
        if self._client is not None:
            await self._client.close()


def _ask(url: str, path: str, body: JSON | None = None) -> JSON:
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=30) as response:
            answer: JSON = json.load(response)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"no OpenEnv server answers at {url!r} ({exc}); start it, then try again") from None
    return answer


def _tools(url: str) -> tuple[ToolSchema, ...]:
    """The tools that an MCP environment lists."""
    answer = _ask(url, "mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    return tuple(
        ToolSchema(
            name=tool["name"],
            description=tool.get("description") or "",
            parameters=tool.get("inputSchema") or tool.get("input_schema") or {},
        )
        for tool in answer["result"]["tools"]
    )


def _act(action: JSON, fields: JSON) -> ToolSchema:
    """The one tool that takes an action's fields."""
    parameters = {**action, "properties": fields}
    description = parameters.pop("description", "Act.")
    parameters.pop("title", None)
    return ToolSchema(name="act", description=description, parameters=parameters)


def _shown(observation: JSON) -> str:
    """An observation as the student sees it: a text alone, or JSON."""
    fields = {key: value for key, value in observation.items() if key != "metadata"}
    only = next(iter(fields.values())) if len(fields) == 1 else fields
    return only if isinstance(only, str) else json.dumps(only)


def _result(result: Any) -> str:
    """The result of an MCP tool: its data, or the texts of its content."""
    if isinstance(result, dict) and "content" in result:
        data = result.get("data")
        texts = [part["text"] for part in result["content"] if part.get("type") == "text"]
        return "\n".join(texts) if data is None or texts else json.dumps(data)
    return result if isinstance(result, str) else json.dumps(result)
