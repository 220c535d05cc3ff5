"""A person acting in an environment by hand: calls typed at the terminal, answers and verdict shown."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence

from rich.console import Console

from agentopd.build import Judge, Skill, build_sandbox
from agentopd.config.run import SandboxConfig
from agentopd.rendering import Pythonic, ToolCodec
from agentopd.rollout import EpisodeSpec, RolloutOptions
from agentopd.rollout.episode import Act, EpisodeRun
from agentopd.types import Message, ToolSchema, Verdict

_CALL = re.compile(r"\s*[A-Za-z_][\w.]*\(.*\)\s*", re.DOTALL)


async def play(skill: Skill, seed: int, console: Console) -> Verdict:
    """Play the first held-out task under ``seed``; the end of input ends the episode. Returns the verdict."""
    (task,) = skill.tasks("eval", 1, seed)
    sandbox = build_sandbox(SandboxConfig(), [skill])
    judge = Judge([skill], sandbox)
    try:
        await judge.start([(skill.name, task)])
        spec = EpisodeSpec(task=task, env_cls=skill.env, skill=skill.name, seed=seed)
        actor = _Person(console)
        episode = await EpisodeRun(spec, actor, RolloutOptions(max_malformed=99, sandbox=sandbox)).play()
        verdict = await judge(task, episode)
    finally:
        await sandbox.aclose()
    console.print(f"\n{episode.stop_reason}: outcome {verdict.outcome} ({verdict.status}) {verdict.detail}".rstrip())
    return verdict


class _Person:
    """The actor at the keyboard."""

    max_context = math.inf

    def __init__(self, console: Console) -> None:
        self.codec: ToolCodec = Pythonic()
        self._console = console

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        self._show(messages)
        for tool in tools:
            arguments = ", ".join(tool.parameters.get("properties", {}))
            self._console.print(f"  {tool.name}({arguments})  {tool.description}", markup=False, highlight=False)
        return []

    def observe(self, messages: Sequence[Message]) -> list[int]:
        self._show(messages)
        return []

    async def act(self, turn: int, token_ids: Sequence[int], room: int) -> Act | None:
        try:
            line = await asyncio.to_thread(input, "> ")
        except EOFError:
            return None
        return Act(f"[{line.strip()}]" if _CALL.fullmatch(line) else line)

    def _show(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._console.print(f"{message.role}: {message.content}", markup=False, highlight=False)
