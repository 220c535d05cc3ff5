"""Environments with a user who speaks more than once, by a script."""

from __future__ import annotations

from agentopd.contracts import AssistantTurn, StepResult
from agentopd.types import Message
from agentopd_envs.authoring import ToolEnvironment


class ConversationEnvironment(ToolEnvironment):
    """A turn without calls is spoken to the user, who answers with the next of ``task.public["user_turns"]``.

    After the last of them the episode ends. ``yielded`` is called each time the student has spoken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spoken = 0

    async def step(self, action: AssistantTurn) -> StepResult:
        """Answer the calls of a turn, or what was said."""
        result = await super().step(action)
        if result.messages or self._finished:
            return result
        self.yielded()
        user_turns = self.task.public.get("user_turns", ())
        self._spoken += 1
        if self._spoken > len(user_turns):
            return result
        answer = Message(role="user", content=user_turns[self._spoken - 1])
        return StepResult(messages=(answer,), events=result.events)

    def yielded(self) -> None:
        """The student has spoken to the user."""
