"""Anchors: supervised terms on trajectories that the student did not sample.

Gold or teacher trajectories, token by token: their negative log-likelihood (with CHORD's weight ``p (1 - p)`` where
``stabiliser.phi_target`` says so), or the forward KL to the teacher's distribution at the same prefixes. How strong
the term is at each step is ``config.objective.anchor_coef``. Denominators count kept trajectories only: one that the
correctness filter drops never enters the batch.
"""

from __future__ import annotations

from torch import Tensor

from agentopd.objective.divergences import forward_kl
from agentopd.objective.support import bucketed


def gold_nll(logprobs_N: Tensor, anchor_scale_N: Tensor) -> Tensor:
    """``-sum scale * log p_S`` (scalar, nats): the mean NLL of each skill's anchor tokens, mixed by shares."""
    return -(anchor_scale_N * logprobs_N).sum()


def anchor_forward_kl(student_NK: Tensor, teacher_NK: Tensor, anchor_scale_N: Tensor) -> Tensor:
    """``sum scale * KL(teacher || student)`` on the teacher's top-K ids with a tail bucket (scalar, nats)."""
    return (anchor_scale_N * bucketed(student_NK, teacher_NK, forward_kl)).sum()
