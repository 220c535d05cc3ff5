"""One episode: an actor and an environment taking turns until something ends it.

The actor decides where turns come from (a sampled student, a fixed script); everything else is the same for both, so
that gold and starter trajectories are judged exactly as a student's would be.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from agentopd.contracts import AssistantTurn, Environment, EpisodeContext, Sandbox, StepResult
from agentopd.errors import EnvironmentFault, ToolError
from agentopd.rendering.codecs import ToolCodec, call_spans
from agentopd.types import Episode, Event, Message, StopReason, Task, ToolSchema, Turn

T = TypeVar("T")


@dataclass(frozen=True)
class EpisodeSpec:
    """One episode to run. ``id`` names it among the episodes of a run; ``seed`` is all the randomness it has."""

    task: Task
    env_cls: type[Environment]
    id: str = ""
    group_id: str = ""
    skill: str = ""
    seed: int = 0


@dataclass(frozen=True)
class RolloutOptions:
    """How episodes are sampled, beyond the limits each task carries."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_malformed: int = 3
    """Malformed tool calls, over the whole episode, that end it."""
    sandbox: Sandbox | None = None
    """Handed to environments that run programs."""
    max_live: Mapping[str, int] = field(default_factory=dict)
    """Episodes under way at once, by skill; skills that are not named have no bound."""
    own_batches: frozenset[str] = frozenset()
    """Skills whose episodes are decoded apart from the others'."""


@dataclass(frozen=True)
class Act:
    """One assistant turn as an actor delivers it; ids and log-probs are empty where there is no tokenizer."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    weight_version: int = 0
    token_ends: tuple[int, ...] = ()
    updates: tuple[tuple[int, int], ...] = ()
    """See ``Turn``, both."""


class Actor(Protocol):
    """Where assistant turns come from."""

    codec: ToolCodec

    @property
    def max_context(self) -> float:
        """Tokens an episode may hold, prompt included."""
        ...

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        """Prompt ids."""
        ...

    def observe(self, messages: Sequence[Message]) -> list[int]:
        """Ids to append after a turn."""
        ...

    async def act(self, turn: int, token_ids: Sequence[int], room: int) -> Act | None:
        """The next turn, of at most ``room`` ids; None if there is none."""
        ...


class _WallTimeSpent(Exception):
    """The environment used up the wall time of its episode."""


@dataclass
class EpisodeRun:
    """The running state of one episode. ``play`` it once; it returns the finished record."""

    spec: EpisodeSpec
    actor: Actor
    options: RolloutOptions
    tools: Sequence[ToolSchema] = ()
    prompt_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    env_s: float = 0.0
    """Seconds the environment took. Only these count against the wall limit: waiting for a batch is nobody's doing."""
    act_s: float = 0.0

    async def play(self) -> Episode:
        """Run to the end. Whatever environment code raises ends the episode with ``env_error``; engine faults pass."""
        stop_reason, error = StopReason.ENV_ERROR, ""
        try:
            with self._attributed("constructor"):
                env = self.spec.env_cls()
            try:
                stop_reason = await self._until_timeout(env)
                with self._attributed("state"):
                    self.state = env.state()
            finally:
                await self._close(env)
        except (EnvironmentFault, ToolError) as exc:
            stop_reason, error = StopReason.ENV_ERROR, str(exc)
        return self._episode(stop_reason, error)

    async def _until_timeout(self, env: Environment) -> StopReason:
        try:
            return await self._turns(env)
        except _WallTimeSpent:
            return StopReason.TIMEOUT

    async def _turns(self, env: Environment) -> StopReason:
        task = self.spec.task.student_view()
        context = EpisodeContext(self.spec.seed, random.Random(self.spec.seed), self.options.sandbox)
        messages = await self._reset(env, task, context)
        with self._attributed("tool_schemas"):
            self.tools = self.spec.env_cls.tool_schemas(task)
        self.prompt_ids = self.actor.open(messages, self.tools)
        token_ids = list(self.prompt_ids)
        for index in range(task.limits.max_turns):
            stop_reason = await self._act(index, token_ids)
            if stop_reason is not None:
                return stop_reason
            result = await self._step(env)
            self.events += result.events
            self._amend(results=result.messages)
            if result.done:
                return result.stop_reason or StopReason.COMPLETED
            if self.env_s >= task.limits.wall_s:
                return StopReason.TIMEOUT
            if index + 1 < task.limits.max_turns:
                observation = self.actor.observe(result.messages)
                if len(token_ids) + len(observation) >= self.actor.max_context:
                    return StopReason.CONTEXT_OVERFLOW
                self._amend(observation_ids=tuple(observation))
                token_ids += observation
        return StopReason.MAX_TURNS

    async def _reset(self, env: Environment, task: Task, context: EpisodeContext) -> Sequence[Message]:
        """The opening messages. A reset that outlasts the wall limit is a fault: the student has not done anything."""
        try:
            return await self._environment("reset", env.reset(task, context))
        except _WallTimeSpent:
            raise EnvironmentFault(f"{self._where('reset')} took more than {task.limits.wall_s:g} s") from None

    async def _act(self, index: int, token_ids: list[int]) -> StopReason | None:
        """Let the actor take a turn, record it, append its ids; returns why the episode ends here, if it does."""
        limits = self.spec.task.limits
        sampled = sum(len(turn.token_ids) for turn in self.turns)
        budget = min(limits.max_turn_tokens or limits.max_tokens, limits.max_tokens - sampled)
        context = self.actor.max_context - len(token_ids)
        if budget <= 0:
            return StopReason.MAX_TOKENS
        if context <= 0:
            return StopReason.CONTEXT_OVERFLOW
        started = time.monotonic()
        act = await self.actor.act(index, token_ids, int(min(budget, context)))
        self.act_s += time.monotonic() - started
        if act is None:
            return StopReason.MAX_TURNS
        codec = self.actor.codec
        calls, malformed = codec.parse(act.text, self.tools)
        self.turns.append(
            Turn(
                token_ids=act.token_ids,
                rollout_logprobs=act.logprobs,
                text=act.text,
                token_ends=act.token_ends,
                tool_calls=calls,
                malformed=malformed,
                call_spans=call_spans(act.text, codec, len(calls), len(malformed), self.tools),
                finish_reason=act.finish_reason,
                weight_version=act.weight_version,
                updates=act.updates,
            )
        )
        token_ids += act.token_ids
        if act.finish_reason == "length":
            # A turn that was cut off is not acted on: what it would have said is unknown.
            return StopReason.CONTEXT_OVERFLOW if context < budget else StopReason.MAX_TOKENS
        if sum(len(turn.malformed) for turn in self.turns) >= self.options.max_malformed:
            return StopReason.PARSE_ERROR
        if sum(len(turn.tool_calls) for turn in self.turns) > limits.max_tool_calls:
            return StopReason.TOOL_BUDGET
        return None

    async def _step(self, env: Environment) -> StepResult:
        turn = self.turns[-1]
        try:
            result = await self._environment(
                "step", env.step(AssistantTurn(turn.text, turn.tool_calls, turn.malformed))
            )
        except ToolError as exc:
            return StepResult(messages=(Message(role="tool", content=f"error: {exc}"),))
        if not result.done and not result.messages:
            raise EnvironmentFault(f"{self._where('step')} returned neither messages nor done")
        return result

    async def _environment(self, what: str, awaitable: Awaitable[T]) -> T:
        """Await environment code: attribute what it raises, and hold it to the wall time that is left."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.spec.task.limits.wall_s - self.env_s):
                with self._attributed(what):
                    return await awaitable
        except TimeoutError:
            raise _WallTimeSpent from None
        finally:
            self.env_s += time.monotonic() - started

    @contextmanager
    def _attributed(self, what: str) -> Iterator[None]:
        """Whatever is raised inside, machinery used by the environment included, is the environment's fault."""
        try:
            yield
        except ToolError:
            raise
        except Exception as exc:
            raise EnvironmentFault(f"{self._where(what)}: {type(exc).__name__}: {exc}") from exc

    async def _close(self, env: Environment) -> None:
        """A failed clean-up is noted; it does not undo what the episode established."""
        try:
            await env.close()
        except Exception as exc:
            detail = {"error": f"{type(exc).__name__}: {exc}"}
            self.events.append(Event(turn=len(self.turns) - 1, kind="close_failed", data=detail))

    def _where(self, what: str) -> str:
        return f"environment {self.spec.task.env!r}, {what} of task {self.spec.task.id!r}"

    def _amend(self, **fields: Any) -> None:
        self.turns[-1] = self.turns[-1].model_copy(update=fields)

    def _episode(self, stop_reason: StopReason, error: str) -> Episode:
        spec = self.spec
        return Episode(
            id=spec.id or f"{spec.task.id}#{spec.seed}",
            task_id=spec.task.id,
            task_hash=spec.task.hash,
            env=spec.task.env,
            split=spec.task.split,
            skill=spec.skill or spec.task.env,
            group_id=spec.group_id or spec.task.id,
            prompt_ids=tuple(self.prompt_ids),
            turns=tuple(self.turns),
            stop_reason=stop_reason,
            error=error,
            events=tuple(self.events),
            final_state=self.state,
            seed=spec.seed,
            temperature=self.options.temperature,
            timings={"env_s": self.env_s, "act_s": self.act_s},
        )
