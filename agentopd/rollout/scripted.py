"""Fixed assistant turns played through an environment: gold trajectories, shipped starting points, empty answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from agentopd.rendering.codecs import ToolCodec
from agentopd.rendering.templates import ChatRenderer, assistant_text
from agentopd.rollout.episode import Act, EpisodeRun, EpisodeSpec, RolloutOptions
from agentopd.types import Episode, Message, ToolSchema

_DEFAULTS = RolloutOptions()


async def run_scripted(
    spec: EpisodeSpec,
    turns: Sequence[Message],
    codec: ToolCodec,
    renderer: ChatRenderer | None = None,
    options: RolloutOptions = _DEFAULTS,
) -> Episode:
    """Play ``turns`` (assistant messages) instead of sampling; the record is the same as a student's.

    With a renderer, ``token_ids`` are those a student would have had to sample and every rollout log-prob is 0.0, so
    that supervised learning reads the same record; limits then count tokens too. Without one, there are no ids.
    A script that runs out before the environment ends the episode stops it with ``max_turns``.
    """
    return await EpisodeRun(spec, _Script(turns, codec, renderer), options).play()


class _Script:
    """The actor that reads its turns from a list."""

    max_context = math.inf

    def __init__(self, turns: Sequence[Message], codec: ToolCodec, renderer: ChatRenderer | None) -> None:
        self.codec = codec
        self._turns = turns
        self._texts: list[str] = []
        self._renderer = renderer

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        self._texts = [assistant_text(turn, self.codec, tools) for turn in self._turns]
        return self._renderer.open(messages, tools) if self._renderer else []

    def observe(self, messages: Sequence[Message]) -> list[int]:
        return self._renderer.observe(messages) if self._renderer else []

    async def act(self, turn: int, token_ids: Sequence[int], room: int) -> Act | None:
        await asyncio.sleep(0)  # Scripts that run at once take turns, as students do.
        if turn >= len(self._texts):
            return None
        text = self._texts[turn]
        if self._renderer is None:
            return Act(text)
        ids = self._renderer.encode_turn(text)
        cut = len(ids) > room
        if cut:
            ids = ids[:room]
            text = self._renderer.decode_turn(ids)
        ends = self._renderer.token_ends(ids, text)
        return Act(text, tuple(ids), (0.0,) * len(ids), "length" if cut else "stop", token_ends=ends)
