"""PrimeIntellect verifiers, v0: environments with a data set and a rubric, played by their own rollout loop.

Their ``rollout`` runs beside the episode, and where it asks a model for a turn, the student answers: stop conditions,
cleanup and state are theirs and run as they always do. So do reward functions, except that one that raises, which
their rubric counts as 0, is a fault here.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib import metadata
from typing import Any, ClassVar

from agentopd.contracts import AssistantTurn, EpisodeContext, StepResult
from agentopd.errors import ConfigError, EnvironmentFault, boundary
from agentopd.types import Limits, Message, Split, StopReason, Task, ToolCall, ToolSchema
from agentopd_envs.adapters.foreign import ForeignEnvironment, Gold, adapted, by_content

_FAULTS: ContextVar[list[str]] = ContextVar("faults of the reward functions that are being called")


def from_verifiers(env: Any, name: str, gold: Gold | None = None) -> type[ForeignEnvironment]:
    """An environment of a verifiers v0 environment (``load_environment()``), with a task for each row of its data.

    Rows are divided by their content; where it has an ``eval_dataset``, that is the split ``eval``. The outcome is the
    reward over the sum of the positive weights. Raises ``ConfigError`` for rewards that compare episodes of a group.
    """
    try:
        import verifiers.clients  # noqa: F401
    except ImportError:
        raise ConfigError("v0 environments of verifiers need: pip install 'agentopd[verifiers]'") from None
    if env.rubric.has_group_rewards:
        raise ConfigError(f"environment {name!r}: its rubric compares the episodes of a group, which is not supported")
    rubrics = _leaves(env.rubric)
    for rubric in rubrics:
        rubric.funcs = [_noting(function) for function in rubric.funcs]
    best = sum(weight for rubric in rubrics for weight in rubric.weights if weight > 0)
    if not best:
        raise ConfigError(f"environment {name!r}: no function of its rubric has a weight above 0")
    turns = getattr(env, "max_turns", -1)
    limits = Limits(max_turns=turns) if turns > 0 else Limits()
    made = {"version": metadata.version("verifiers"), "limits": limits}
    return adapted(_FromVerifiers, name, type(env), gold, _theirs=env, _best=best, **made)


class _FromVerifiers(ForeignEnvironment):
    _theirs: ClassVar[Any]
    _best: ClassVar[float]

    def __init__(self) -> None:
        self._rollout: asyncio.Task[Any] | None = None
        self._conversation: list[Any] = []
        self._turns = 0

    @classmethod
    def _rows(cls, split: Split) -> Iterator[tuple[int, Any]]:
        held_out = cls._theirs.build_eval_dataset() if split == "eval" else None
        if held_out is not None:
            return ((-1 - index, row) for index, row in enumerate(held_out))
        return by_content(cls._theirs.build_dataset() or (), split, _content)

    @classmethod
    def _task(cls, index: int, row: Any) -> Task:
        return cls._asking(map(_ours, row["prompt"]), {"index": index})

    @classmethod
    def tool_schemas(cls, task: Task) -> tuple[ToolSchema, ...]:
        """Their tools."""
        return tuple(
            ToolSchema(name=tool.name, description=tool.description, parameters=tool.parameters)
            for tool in cls._theirs.tool_defs or ()
        )

    async def reset(self, task: Task, ctx: EpisodeContext) -> tuple[Message, ...]:
        """Start their rollout; the opening is what it asks a model."""
        self.task, self.ctx = task, ctx
        index = task.public["index"]
        row = self._theirs.build_dataset()[index] if index >= 0 else self._theirs.build_eval_dataset()[-1 - index]
        self._student = _student()
        self._rollout = asyncio.create_task(self._theirs.rollout(row, self._student, "student", {}))
        opening = await self._heard()
        if opening is None:
            raise EnvironmentFault(f"{self.name}: it ended task {task.id!r} before the first turn")
        return opening

    async def step(self, action: AssistantTurn) -> StepResult:
        """Hand the turn to their loop; the rubric scores it when the loop ends, or turns run out."""
        from verifiers.errors import OverlongPromptError

        offered = bool(self._theirs.tool_defs)
        self._turns += 1
        last = self._turns >= self.task.limits.max_turns
        told = tuple(
            Message(role="tool", content=f"error: malformed tool call: {call.reason}") for call in action.malformed
        )
        if offered and told and not action.tool_calls and not last:
            return StepResult(messages=told)
        self._student.said.put_nowait(_theirs_turn(self._turns, action.text, action.tool_calls if offered else ()))
        answers = await self._heard()
        if answers is not None and not last:
            return StepResult(messages=(*answers, *told) if offered else answers)
        if answers is not None:
            self._student.said.put_nowait(OverlongPromptError())  # How their loop is told that there is no room.
            await self._heard()
        await self._judge()
        return StepResult(done=True, stop_reason=StopReason.COMPLETED if answers is None else StopReason.MAX_TURNS)

    async def close(self) -> None:
        """Stop their rollout if it still runs; its clean-up runs."""
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()
            await asyncio.wait([self._rollout])

    async def _heard(self) -> tuple[Message, ...] | None:
        """What their loop says to the student before it wants another turn; None once it has ended."""
        assert self._rollout is not None
        asked = asyncio.ensure_future(self._student.asked.get())
        try:
            await asyncio.wait([asked, self._rollout], return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                self._rollout.result()  # Raises what their code raised.
                return None
            conversation, tools = asked.result()
        finally:
            asked.cancel()
        known = len(self._conversation)
        if [tool.name for tool in tools or ()] != [schema.name for schema in self.tool_schemas(self.task)]:
            raise EnvironmentFault(f"{self.name} offers other tools on task {self.task.id!r}: not supported")
        if conversation[:known] != self._conversation or (known and conversation[known].role != "assistant"):
            raise EnvironmentFault(f"{self.name} rewrites the conversation, and what was sampled could not be kept")
        self._conversation = [message.model_copy(deep=True) for message in conversation]
        names = {call.id: call.name for message in conversation for call in getattr(message, "tool_calls", None) or ()}
        return tuple(_ours(message, names) for message in conversation[known + bool(known) :])

    async def _judge(self) -> None:
        from verifiers.errors import ToolError

        assert self._rollout is not None
        state, faults = self._rollout.result(), list[str]()
        if state.get("timed_out") or not isinstance(state["error"], ToolError | None):
            raise EnvironmentFault(f"{self.name}: {state['error'] or 'timeout_seconds passed, sampling included'}")
        _FAULTS.set(faults)
        with boundary(EnvironmentFault, f"{self.name}: rubric"):
            await self._theirs.rubric.score_rollout(state)
            await self._theirs.rubric.cleanup(state)
        if faults:
            raise EnvironmentFault(f"{self.name}: reward function {faults[0]}")
        self._reward = float(state["reward"]) / self._best
        self._metrics = {key: float(value) for key, value in state["metrics"].items()}


@functools.cache
def _student_class() -> type:
    from verifiers.clients import Client

    async def unused(self: Any, *args: Any) -> Any:
        raise NotImplementedError

    class Student(Client):  # type: ignore[misc]
        """The model of their loop: it puts what it is asked into one queue and reads its answer from another."""

        setup_client = to_native_tool = to_native_prompt = get_native_response = unused
        raise_from_native_response = from_native_response = close = unused

        async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
            self.asked.put_nowait((prompt, tools))
            said = await self.said.get()
            if isinstance(said, Exception):
                raise said
            return said

    return Student


def _student() -> Any:
    student = _student_class()(None)
    student.asked, student.said = asyncio.Queue(), asyncio.Queue()
    return student


def _theirs_turn(turn: int, text: str, calls: Sequence[ToolCall]) -> Any:
    """A turn as the response of a model. Its text is what the student wrote, calls included."""
    from verifiers import types

    made = [
        types.ToolCall(id=f"call_{turn}_{index}", name=call.name, arguments=json.dumps(call.arguments))
        for index, call in enumerate(calls)
    ]
    reason = "tool_calls" if made else "stop"
    message = types.ResponseMessage(content=text, tool_calls=made or None, finish_reason=reason, is_truncated=False)
    return types.Response(id="student", created=0, model="student", message=message)


def _ours(message: Any, names: dict[str, str] | None = None) -> Message:
    """A message of theirs, a row's dict or a record; raises ``EnvironmentFault`` for what is not text."""
    fields = message if isinstance(message, dict) else message.model_dump()
    content = fields.get("content") or ""
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            raise EnvironmentFault(f"a {fields['role']} message holds more than text, which is not supported")
        content = "\n".join(part["text"] for part in content)
    calls = tuple(
        ToolCall(name=call["name"], arguments=json.loads(call["arguments"])) for call in fields.get("tool_calls") or ()
    )
    name = (names or {}).get(fields.get("tool_call_id", ""))
    return Message(role=fields["role"], content=content, tool_calls=calls, name=name)


def _content(row: Any) -> str:
    return json.dumps({key: value for key, value in row.items() if key != "example_id"}, sort_keys=True, default=str)


def _leaves(rubric: Any) -> list[Any]:
    return [leaf for inner in rubric.rubrics for leaf in _leaves(inner)] if hasattr(rubric, "rubrics") else [rubric]


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        except Exception as exc:
            _FAULTS.get([]).append(f"{function.__name__}: {type(exc).__name__}: {exc}")
            raise

    return call
