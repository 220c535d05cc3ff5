"""A teacher in vLLM: log-probs of the prompt tokens, in flat arrays rather than a dictionary per token.

Scoring is at temperature 1 whatever the sampling settings, and reads no prefix cache. Ids that the student chose are
scored where vLLM has model runner V2, which takes a GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np

from agentopd.contracts import Evidence, FloatArray, IntArray
from agentopd.engines.vllm_process import BlockingLLM, blaming_the_cache, common_args, require_vllm, start
from agentopd.errors import QuestionError, TeacherEndedError, TeacherError, boundary
from agentopd.models import load_shape, resolve_model, settle_dtype
from agentopd.teachers.ids import check_ids, scored_ids, within
from agentopd.types import Episode

T = TypeVar("T")
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


def start_vllm_teacher(name: str, model: str, dtype: str, vocab_size: int, limits: Limits | None = None) -> VLLMTeacher:
    """Start vLLM on ``model`` (a directory or hub id) within ``limits``; ``VLLMCandidateTeacher`` where it can be one.

    Raises ``ConfigError`` where vLLM is not installed, and where its cache cannot hold an episode of the largest
    context; ``TeacherError`` for any other failure.
    """
    require_vllm()
    limits = limits or Limits()
    shape, context = load_shape(model), limits.max_context
    if context is not None and context != shape.max_position_embeddings:
        context += 1  # vLLM always samples a token, and wants room for it
    args = {
        **common_args(limits.kv_cache_gb, None),
        "model": resolve_model(model),
        "dtype": settle_dtype(dtype),
        "max_logprobs": min(limits.max_top_k, vocab_size),
        "max_model_len": context,
    }
    blaming = blaming_the_cache(shape, args, ("--max-context", "--kv-cache-gb"))
    with boundary(TeacherError, f"starting vLLM for teacher {name!r}"), blaming:
        started = start(args, _START_S)
    kind = VLLMCandidateTeacher if _scores_given_ids(started.llm) else VLLMTeacher
    return kind(name, started, vocab_size, limits.max_top_k)


def _scores_given_ids(llm: Any) -> bool:
    from vllm import SamplingParams

    return hasattr(SamplingParams, "prompt_logprob_token_ids") and bool(
        getattr(llm.vllm_config, "use_v2_model_runner", False)
    )


class VLLMTeacher:
    """Scores episodes with a vLLM that was started, at most ``max_top_k`` ids a token.

    ``vocab_size`` is the number of ids shared with the student. Rows that a checkpoint pads its vocabulary with take
    part in the softmax, and are then left out as ``within`` does.
    """

    def __init__(self, name: str, llm: BlockingLLM, vocab_size: int, max_top_k: int) -> None:
        self.name = name
        self._llm = llm
        self._vocab_size = vocab_size
        self._bound = min(max_top_k, vocab_size)
        self.max_top_k: int | None = self._bound
        self._ids = count()

    async def score(self, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        """Evidence of each episode, in order; ``top_k`` is capped to the vocabulary, 0 leaves the top-K out.

        Raises ``QuestionError`` for a ``top_k`` above ``max_top_k``, and for episodes that are too long or have ids
        that the model lacks; ``TeacherEndedError`` where vLLM's process is dead, and ``TeacherError`` where it fails.
        """
        k = min(top_k, self._vocab_size)
        return await self._run(episodes, k, (self._one(episode, k) for episode in episodes))

    async def aclose(self) -> None:
        """Stop vLLM's process."""
        await asyncio.to_thread(self._llm.close)

    async def _run(self, episodes: Sequence[Episode], k: int, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of ``work`` on vLLM's loop, one for each episode, with ``k`` ids a token."""
        if k > self._bound:
            raise QuestionError(
                f"teacher {self.name!r} gives at most {self._bound} ids a token, and {k} were asked for: "
                f"serve it with --top-k {k}"
            )
        for episode in episodes:
            self._check(episode)

        async def together() -> list[T]:
            return list(await asyncio.gather(*work))

        with boundary(TeacherError, f"teacher {self.name!r}"):
            try:
                return await self._llm.loop.run(together())
            except Exception as exc:
                if self._llm.llm.errored:
                    raise TeacherEndedError(f"teacher {self.name!r}: {type(exc).__name__}: {exc}") from exc
                raise

    def _check(self, episode: Episode) -> None:
        ids, model = scored_ids(episode), self._llm.llm.vllm_config.model_config
        most, rows = model.max_model_len - 1, model.get_vocab_size()
        if len(ids) > most:
            raise QuestionError(
                f"teacher {self.name!r} takes episodes of {most} tokens, and one has {len(ids)}: "
                f"serve it with --max-context {len(ids)}, or shorten the episodes"
            )
        check_ids(self.name, rows, ids)

    async def _one(self, episode: Episode, k: int) -> Evidence:
        positions_N = np.flatnonzero(np.array(episode.loss_mask))
        if not len(positions_N):
            nothing = np.zeros((0, k), np.float32)
            return Evidence(self.name, np.zeros(0, np.float32), nothing.astype(np.int64), nothing)
        ids = scored_ids(episode)
        final = await self._read(ids, prompt_logprobs=k, flat_logprobs=True)
        found = self._evidence(final.prompt_logprobs, positions_N, k)
        return within(self._vocab_size, found, np.array(ids)[positions_N])

    async def _read(self, ids: list[int], **wanted: Any) -> Any:
        """What vLLM says of a prompt of ``ids``, with what is ``wanted`` of it."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **wanted
        )
        outputs = self._llm.llm.generate(TokensPrompt(prompt_token_ids=ids), params, f"score-{next(self._ids)}")
        (final,) = [output async for output in outputs]
        return final

    def _evidence(self, flat: Any, positions_N: Any, k: int) -> Evidence:
        # Each position holds the prompt's own token first, then its K most likely; the first position holds none.
        shape = (int(positions_N[-1]), k + 1)
        logprobs = np.array(flat.logprobs, np.float32).reshape(shape)[positions_N - 1]
        ids = np.array(flat.token_ids, np.int64).reshape(shape)[positions_N - 1]
        return Evidence(self.name, logprobs[:, 0], ids[:, 1:] if k else None, logprobs[:, 1:] if k else None)


class VLLMCandidateTeacher(VLLMTeacher):
    """One whose vLLM also scores ids that it did not choose."""

    async def score_ids(self, episodes: Sequence[Episode], ids: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probs (n, K) at given ids (n, K) of each episode; -inf beyond the shared vocabulary.

        Raises as ``score`` does.
        """
        k = max((chosen.shape[1] for chosen in ids), default=0)
        work = (self._at_ids(episode, chosen) for episode, chosen in zip(episodes, ids, strict=True))
        return await self._run(episodes, k, work)

    async def _at_ids(self, episode: Episode, ids_NK: IntArray) -> FloatArray:
        if not ids_NK.size:
            return np.zeros(ids_NK.shape, np.float32)
        read, positions_N = scored_ids(episode), np.flatnonzero(np.array(episode.loss_mask))
        # vLLM wants a row for every token from ``start`` + 1 to the last; -1 asks for nothing, and is answered by -inf.
        start = int(positions_N[0]) - 1
        rows_RK = np.full((len(read) - 1 - start, ids_NK.shape[1]), -1)
        rows_RK[positions_N - 1 - start] = np.where(ids_NK < self._vocab_size, ids_NK, -1)
        final = await self._read(read, prompt_logprob_token_ids=rows_RK, prompt_logprob_start=start)
        found_RK = np.asarray(final.prompt_token_id_logprobs, np.float32)
        if found_RK.shape != rows_RK.shape:
            raise TeacherError(f"vLLM gave log-probs of shape {found_RK.shape} for ids of shape {rows_RK.shape}")
        return found_RK[positions_N - 1 - start]
