"""A teacher in vLLM: log-probs of the prompt tokens, in flat arrays rather than a dictionary per token.

Scoring is at temperature 1 whatever the sampling settings, and reads no prefix cache. Ids that the student chose need
vLLM's model runner V2, which this class does not use: ask a local teacher for those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from agentopd.contracts import Evidence
from agentopd.engines.vllm_process import blaming_the_cache, common_args, require_vllm, start
from agentopd.errors import QuestionError, TeacherEndedError, TeacherError, boundary
from agentopd.models import load_shape, resolve_model, settle_dtype
from agentopd.teachers.ids import check_ids, scored_ids, within
from agentopd.types import Episode

_START_S = 1800.0


@dataclass(frozen=True)
class Limits:
    """What vLLM is started for."""

    max_top_k: int = 64
    """Most ids a token that it can be asked for."""
    max_context: int | None = None
    """Tokens of an episode, prompt included; None is the most that the model takes."""
    kv_cache_gb: float = 1.0
    """Memory for keys and values."""


class VLLMTeacher:
    """Scores episodes with ``model`` (a directory or hub id), within ``limits``.

    ``vocab_size`` is the number of ids shared with the student. Rows that a checkpoint pads its vocabulary with take
    part in the softmax, and are then left out as ``within`` does. Raises ``ConfigError`` where vLLM is not installed,
    and where its cache cannot hold an episode of the largest context.
    """

    def __init__(self, name: str, model: str, dtype: str, vocab_size: int, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        require_vllm()
        self.name = name
        self._vocab_size = vocab_size
        self._bound = min(limits.max_top_k, vocab_size)
        self.max_top_k: int | None = self._bound
        self._ids = count()
        shape, context = load_shape(model), limits.max_context
        if context is not None and context != shape.max_position_embeddings:
            context += 1  # vLLM always samples a token, and wants room for it
        args = {
            **common_args(limits.kv_cache_gb, None),
            "model": resolve_model(model),
            "dtype": settle_dtype(dtype),
            "max_logprobs": self._bound,
            "max_model_len": context,
        }
        blaming = blaming_the_cache(shape, args, ("--max-context", "--kv-cache-gb"))
        with boundary(TeacherError, f"starting vLLM for teacher {name!r}"), blaming:
            self._llm = start(args, _START_S)

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order; ``top_k`` is capped to the vocabulary, 0 leaves the top-K out.

        Raises ``QuestionError`` for a ``top_k`` above ``max_top_k``, and for episodes that are too long or have ids
        that the model lacks; ``TeacherEndedError`` where vLLM's process is dead, and ``TeacherError`` where it fails.
        """
        top_k = min(top_k, self._vocab_size)
        if top_k > self._bound:
            raise QuestionError(
                f"teacher {self.name!r} gives at most {self._bound} ids a token, and {top_k} were asked for: "
                f"serve it with --top-k {top_k}"
            )
        for episode in episodes:
            self._check(episode)
        with boundary(TeacherError, f"teacher {self.name!r}"):
            try:
                return await self._llm.loop.run(self._score(episodes, top_k))
            except Exception as exc:
                if self._llm.llm.errored:
                    raise TeacherEndedError(f"teacher {self.name!r}: {type(exc).__name__}: {exc}") from exc
                raise

    async def aclose(self) -> None:
        """Stop vLLM's process."""
        await asyncio.to_thread(self._llm.close)

    def _check(self, episode: Episode) -> None:
        ids, model = scored_ids(episode), self._llm.llm.vllm_config.model_config
        most, rows = model.max_model_len - 1, model.get_vocab_size()
        if len(ids) > most:
            raise QuestionError(
                f"teacher {self.name!r} takes episodes of {most} tokens, and one has {len(ids)}: "
                f"serve it with --max-context {len(ids)}, or shorten the episodes"
            )
        check_ids(self.name, rows, ids)

    async def _score(self, episodes: Sequence[Episode], k: int) -> list[Evidence]:
        return list(await asyncio.gather(*(self._one(episode, k) for episode in episodes)))

    async def _one(self, episode: Episode, k: int) -> Evidence:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        positions_N = np.flatnonzero(np.array(episode.loss_mask))
        if not len(positions_N):
            nothing = np.zeros((0, k), np.float32)
            return Evidence(self.name, np.zeros(0, np.float32), nothing.astype(np.int64), nothing)
        ids = scored_ids(episode)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = self._llm.llm.generate(TokensPrompt(prompt_token_ids=ids), params, f"score-{next(self._ids)}")
        (final,) = [output async for output in outputs]
        found = self._evidence(final.prompt_logprobs, positions_N, k)
        return within(self._vocab_size, found, np.array(ids)[positions_N])

    def _evidence(self, flat: Any, positions_N: Any, k: int) -> Evidence:
        # Each position holds the prompt's own token first, then its K most likely; the first position holds none.
        shape = (int(positions_N[-1]), k + 1)
        logprobs = np.array(flat.logprobs, np.float32).reshape(shape)[positions_N - 1]
        ids = np.array(flat.token_ids, np.int64).reshape(shape)[positions_N - 1]
        return Evidence(self.name, logprobs[:, 0], ids[:, 1:] if k else None, logprobs[:, 1:] if k else None)
