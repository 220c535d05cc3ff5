"""A teacher on another machine, behind ``agentopd serve``: asked in batches, a few at once, patiently.

A question that meets a lost connection, a time-out, 5xx or a server that is busy is asked again with growing pauses. A
teacher that stays away makes the run wait, and say so, until ``outage_s`` are over; what it then gives up with is an
error, never a made-up number.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np

from agentopd.config.teachers import ServedTeacherConfig
from agentopd.contracts import Evidence, FloatArray, IntArray
from agentopd.engines.http import Address, Away, Refused, ask
from agentopd.errors import ConfigError, TeacherError
from agentopd.teachers import wire
from agentopd.teachers.ids import within
from agentopd.types import Episode

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LOOK_S = 0.2, 15.0, 0.01
_SAY_AFTER_S = 1.0
"""An outage that is over sooner is not worth a line."""


@dataclass(frozen=True)
class Needs:
    """What a run reads of a served teacher."""

    vocabulary: str
    """Hash of the student's."""
    vocab_size: int
    """Ids of the student's tokenizer."""
    top_k: int = 0
    """Ids a token that the teacher chooses."""
    student_top_k: int = 0
    """Ids a token that the student chooses."""


class _Bound:
    """At most so many at once, over all event loops: batches ahead are scored on another one than that of a step."""

    def __init__(self, most: int) -> None:
        self._free = threading.Semaphore(most)

    async def __aenter__(self) -> None:
        while not self._free.acquire(blocking=False):
            await asyncio.sleep(_LOOK_S)

    async def __aexit__(self, *exc: object) -> None:
        self._free.release()


class ServedTeacher:
    """``name`` is its key in ``[teachers]``. Ids beyond the student's never leave it: see ``within``.

    Raises ``ConfigError`` for a server that scores another tokenizer's ids or gives less than ``needs``, and
    ``TeacherError`` where there is none.
    """

    def __init__(self, name: str, config: ServedTeacherConfig, needs: Needs) -> None:
        self.name = name
        self._vocab_size = needs.vocab_size
        self._config = config
        self._bound = _Bound(config.concurrency)
        self._address = Address.parse(config.base_url, f"teachers.{name}.base_url")
        about = self._about()
        self.max_top_k: int | None = about["max_top_k"]
        self.model: str = about["model"]
        """Digest of its weights."""
        if about["vocabulary"] != needs.vocabulary:
            raise ConfigError(
                f"teacher {name!r} at {config.base_url} and the student disagree on token ids: serve a model with the "
                "student's tokenizer"
            )
        self._check_suffices(needs, about["candidates"])

    def _check_suffices(self, needs: Needs, candidates: bool) -> None:
        who = f"teacher {self.name!r} at {self._config.base_url}"
        if needs.student_top_k and not candidates:
            raise ConfigError(
                f"{who} cannot score ids that it did not choose, and the objective needs its log-probs of the "
                f"student's own {needs.student_top_k} a token: serve it with --kind hf, or with --kind vllm "
                "where vLLM has model runner V2 (on a GPU), or choose another preset"
            )
        most = min(max(needs.top_k, needs.student_top_k), needs.vocab_size)
        if self.max_top_k is not None and most > self.max_top_k:
            raise ConfigError(
                f"{who} gives at most {self.max_top_k} ids a token, and the objective needs {most}: "
                f"serve it with --top-k {most}, or lower the objective's top_k"
            )

    def _about(self) -> dict[str, Any]:
        """What the server says of itself. Raises ``ConfigError`` where something else than a teacher answers."""
        try:
            about = json.loads(asyncio.run(self._patiently("GET", "/about", b"")))
            return {key: about[key] for key in ("max_top_k", "candidates", "model", "vocabulary")}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"teachers.{self.name}.base_url {self._config.base_url!r} answers, and not as a teacher does: give the "
                "address that `agentopd serve` prints, of the version that is installed here"
            ) from None

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order. Raises ``TeacherError`` for unusable answers and an endless outage."""
        k = top_k if self.max_top_k is None else min(top_k, self.max_top_k)

        def read(data: bytes, episode: Episode) -> Evidence:
            found = wire.unpack_evidence(data, self.name)
            shown = 0 if found.topk_ids is None else found.topk_ids.shape[1]
            if len(found.teacher_logprobs) != episode.num_sampled or shown != (k if episode.num_sampled else shown):
                raise ValueError(f"{len(found.teacher_logprobs)} tokens and K = {shown} for another question")
            return within(self._vocab_size, found, np.array(episode.token_ids)[np.flatnonzero(episode.loss_mask)])

        return await self._ask_all("/score", episodes, lambda chosen: {"top_k": top_k}, read)

    async def score_ids(self, episodes: Sequence[Episode], ids: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probs (n, K) at given ids (n, K) of each episode, where the server's teacher can.

        Raises ``TeacherError`` where it cannot.
        """

        def read(data: bytes, episode: Episode) -> FloatArray:
            logprobs = wire.unpack_logprobs(data)
            if len(logprobs) != episode.num_sampled:
                raise ValueError(f"{len(logprobs)} rows for {episode.num_sampled} tokens")
            return logprobs

        found = await self._ask_all(
            "/score_ids", episodes, lambda chosen: {"ids": [ids[i].tolist() for i in chosen]}, read
        )
        return [
            np.where(chosen < self._vocab_size, logprobs, -np.inf).astype(np.float32)
            for chosen, logprobs in zip(ids, found, strict=True)
        ]

    async def aclose(self) -> None:
        """Nothing to release: connections live as long as one question."""

    async def _ask_all(
        self,
        path: str,
        episodes: Sequence[Episode],
        more: Callable[[Sequence[int]], dict[str, Any]],
        read: Callable[[bytes, Episode], T],
    ) -> list[T]:
        """The answers on all episodes, in order, from questions of about ``batch_tokens`` tokens each."""

        async def ask(chosen: Sequence[int]) -> list[T]:
            mine = [episodes[i] for i in chosen]
            async with self._bound:
                # The server joins questions that are the same to the byte: these are tries of one, and nothing else.
                question = wire.pack_episodes(mine, asked=uuid4().hex, **more(chosen))
                body = await self._patiently("POST", path, question)
            try:
                return [read(data, episode) for data, episode in zip(wire.split(body), mine, strict=True)]
            except ValueError as exc:
                raise TeacherError(f"teacher {self.name!r} gave an unusable answer: {exc}") from exc

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(chosen)) for chosen in self._batches(episodes)]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [answer for task in tasks for answer in task.result()]

    def _batches(self, episodes: Sequence[Episode]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for index, episode in enumerate(episodes):
            size = len(episode.token_ids)
            if size > room:
                batches.append([])
                room = self._config.batch_tokens
            batches[-1].append(index)
            room -= size
        return batches

    async def _patiently(self, method: str, path: str, body: bytes) -> bytes:
        """The body of the reply, however long the teacher is away, up to ``outage_s``."""
        started, pause, told = time.monotonic(), _FIRST_PAUSE_S, False
        while True:
            try:
                answer = await ask(self._address, method, path, body, self._config.timeout_s)
            except Refused as exc:
                raise TeacherError(f"teacher {self.name!r} at {self._config.base_url}: {exc}") from None
            except Away as exc:
                away = time.monotonic() - started
                if away + pause > self._config.outage_s:
                    raise TeacherError(f"teacher {self.name!r} was away for {away:.0f} s: {exc}") from None
                if away >= _SAY_AFTER_S and not told:
                    _LOG.warning("teacher %r at %s is away (%s): waiting", self.name, self._config.base_url, exc)
                    told = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if told:
                    _LOG.warning("teacher %r is back after %.0f s", self.name, time.monotonic() - started)
                return answer
