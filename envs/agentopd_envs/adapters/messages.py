"""One episode for a caller that speaks in messages: no tokens, the same record, the same verdict."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from agentopd.contracts import AssistantTurn, EpisodeContext, Sandbox, StepResult, Verifier
from agentopd.errors import EnvironmentFault, boundary
from agentopd.registry import verifiers
from agentopd.types import Episode, Event, MalformedCall, Message, StopReason, Task, ToolCall, Turn, Verdict


class MessageEpisode:
    """Plays one task of an environment class. What environment code raises is an ``EnvironmentFault``."""

    def __init__(self, env_cls: Any, task: Task, sandbox: Sandbox | None = None, seed: int = 0) -> None:
        self._env = env_cls()
        self._env_cls, self._task, self._sandbox, self._seed = env_cls, task, sandbox, seed
        self._turns: list[Turn] = []
        self._events: list[Event] = []
        self.done = False

    async def open(self) -> tuple[Message, ...]:
        """The opening messages."""
        context = EpisodeContext(self._seed, random.Random(self._seed), self._sandbox)
        with boundary(EnvironmentFault, f"reset of task {self._task.id!r}"):
            opening: tuple[Message, ...] = await self._env.reset(self._task.student_view(), context)
        return opening

    async def act(
        self, text: str, calls: Sequence[ToolCall] = (), malformed: Sequence[MalformedCall] = ()
    ) -> tuple[Message, ...]:
        """Take one assistant turn; what the environment answers, nothing once the episode is ``done``."""
        with boundary(EnvironmentFault, f"step of task {self._task.id!r}"):
            result: StepResult = await self._env.step(AssistantTurn(text, tuple(calls), tuple(malformed)))
        turn = Turn(token_ids=(), rollout_logprobs=(), text=text, tool_calls=tuple(calls), malformed=tuple(malformed))
        self._turns.append(turn.model_copy(update={"results": result.messages}))
        self._events += result.events
        self.done = result.done or len(self._turns) >= self._task.limits.max_turns
        return result.messages

    def record(self) -> Episode:
        """What happened so far."""
        return Episode(
            id=f"{self._task.id}#{self._seed}",
            task_id=self._task.id,
            task_hash=self._task.hash,
            env=self._task.env,
            split=self._task.split,
            prompt_ids=(),
            turns=tuple(self._turns),
            stop_reason=StopReason.COMPLETED if self.done else StopReason.MAX_TURNS,
            events=tuple(self._events),
            final_state=self._env.state(),
            seed=self._seed,
        )

    async def verdict(self) -> Verdict:
        """Judge what happened so far. A machinery fault raises ``InfraError`` or has no outcome."""
        verifier = _verifier(self._env_cls.verifier_for(self._task))
        return await verifier.verify(self._task, self.record(), self._sandbox if verifier.needs_sandbox else None)

    async def close(self) -> None:
        """Release the environment; idempotent."""
        await self._env.close()


@cache
def _verifier(name: str) -> Verifier:
    made: Verifier = verifiers.get(name)()
    return made
