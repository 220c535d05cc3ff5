"""Where probes are played: one skill, its sampled tasks, its judge, and a record of all the student was shown."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentopd.build import Judge, Skill
from agentopd.certify.probes import Trajectory
from agentopd.contracts import Verifier
from agentopd.rendering import HermesJSON, assistant_text
from agentopd.rendering.codecs import ToolCodec
from agentopd.rollout import EpisodeSpec, RolloutOptions
from agentopd.rollout.episode import Act, EpisodeRun
from agentopd.types import Episode, Message, Task, ToolSchema, Verdict

NOOP: Trajectory = (Message(role="assistant"),)


@dataclass(frozen=True)
class Played:
    """One probe: the episode, every message and schema the student saw, and the verdict."""

    episode: Episode
    seen: tuple[Message, ...]
    tools: tuple[ToolSchema, ...]
    verdict: Verdict

    @property
    def told(self) -> str:
        """All text from the environment, the tool results included, without what the student wrote."""
        return "\n".join(
            [*(message.content for message in self.seen), *(tool.model_dump_json() for tool in self.tools)]
        )

    @property
    def what(self) -> str:
        """The verdict in words, for a finding."""
        detail = self.verdict.detail or self.episode.error
        return f"outcome {self.verdict.outcome} ({self.verdict.status}{': ' + detail if detail else ''})"


@dataclass
class Stage:
    """Plays trajectories of one skill's tasks."""

    skill: Skill
    tasks: Sequence[Task]
    judge: Judge
    codec: ToolCodec = field(default_factory=HermesJSON)

    def verifier(self, task: Task) -> Verifier:
        """The verifier that judges the task."""
        return self.judge.verifier(self.skill.name, task)

    def gold(self, task: Task) -> Trajectory:
        """A trajectory that solves the task."""
        turns: Trajectory = tuple(self.skill.env.gold_turns(task))  # type: ignore[attr-defined]
        return turns

    async def play(self, task: Task, turns: Trajectory, seed: int = 0) -> Played:
        """Play and judge one trajectory. Episodes that run at once take turns after every step."""
        actor = _Actor(turns, self.codec)
        spec = EpisodeSpec(task=task, env_cls=self.skill.env, skill=self.skill.name, seed=seed)
        episode = await EpisodeRun(spec, actor, RolloutOptions(max_malformed=99, sandbox=self.judge.sandbox)).play()
        seen = (*actor.seen, *(message for turn in episode.turns for message in turn.results))
        return Played(episode, seen, actor.tools, await self.judge(task, episode))

    async def play_all(self, probes: Sequence[tuple[Task, Trajectory]]) -> list[Played]:
        """Play many, a bounded number at once, results in order."""
        gate = asyncio.Semaphore(16)

        async def one(task: Task, turns: Trajectory) -> Played:
            async with gate:
                return await self.play(task, turns)

        return list(await asyncio.gather(*(one(task, turns) for task, turns in probes)))


class _Actor:
    """Says its turns one by one, and lets every other episode go first each time."""

    max_context = math.inf

    def __init__(self, turns: Trajectory, codec: ToolCodec) -> None:
        self.codec = codec
        self.seen: tuple[Message, ...] = ()
        self.tools: tuple[ToolSchema, ...] = ()
        self._turns = turns

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        self.seen, self.tools = tuple(messages), tuple(tools)
        return []

    def observe(self, messages: Sequence[Message]) -> list[int]:
        return []

    async def act(self, turn: int, token_ids: Sequence[int], room: int) -> Act | None:
        await asyncio.sleep(0)
        return Act(assistant_text(self._turns[turn], self.codec, self.tools)) if turn < len(self._turns) else None
