"""Rows that a checkpoint pads its vocabulary with: ids without a token, which no objective may see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from agentopd.contracts import Evidence, IntArray


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
