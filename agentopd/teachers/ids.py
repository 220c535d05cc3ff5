"""Which ids of an episode a teacher reads, and which it may name.

Rows that a checkpoint pads its vocabulary with are ids without a token, which no objective may see.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from agentopd.contracts import Evidence, IntArray
from agentopd.errors import QuestionError
from agentopd.types import Episode


def scored_ids(episode: Episode) -> list[int]:
    """The ids up to the last sampled one: all that a teacher reads."""
    positions = np.flatnonzero(episode.loss_mask)
    return episode.token_ids[: int(positions[-1]) + 1] if len(positions) else []


def check_ids(name: str, rows: int, ids: list[int]) -> None:
    """Raise ``QuestionError`` where ``ids`` are not all of the model's ``rows``.

    On a GPU the lookup itself would take the whole process with it.
    """
    if unknown := [token for token in ids if not 0 <= token < rows]:
        raise QuestionError(f"teacher {name!r} has {rows} token ids, and an episode has the id {unknown[0]}")


def within(vocab_size: int, evidence: Evidence, sampled_N: IntArray) -> Evidence:
    """``evidence`` on the first ``vocab_size`` ids alone: -inf for sampled ids (N,) beyond, and unused top-K slots.

    An unused slot holds id 0 and log-prob -inf.
    """
    logprobs = np.where(sampled_N < vocab_size, evidence.teacher_logprobs, -np.inf).astype(np.float32)
    if evidence.topk_ids is None or evidence.topk_logprobs is None:
        return replace(evidence, teacher_logprobs=logprobs)
    used_NK = evidence.topk_ids < vocab_size
    return replace(
        evidence,
        teacher_logprobs=logprobs,
        topk_ids=np.where(used_NK, evidence.topk_ids, 0),
        topk_logprobs=np.where(used_NK, evidence.topk_logprobs, -np.inf).astype(np.float32),
    )
