"""How far the student is from the teacher at each sampled token.

``sampled_pg`` reads one number a token, ``log p_T - log p_S`` of the token sampled: used as a policy-gradient
advantage its expected gradient is that of the per-token reverse KL. ``topk_rkl`` reads the teacher's K most likely
ids and differentiates the reverse KL on them exactly (Revisiting OPD, arXiv 2603.25562). Left out: forward KL and JSD.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

UNUSED = -1e4
"""Finite stand-in for a log-prob of -inf: its exponential is exactly 0 in fp32 and its gradient is no NaN."""
TAIL_FLOOR = 1e-6
"""Mass below which a tail is rounding: sums of fp32 probabilities are good to a few times 1e-7."""


def teacher_margin(teacher_logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """``delta = log p_T - log p_S`` (N,), detached; positive where the teacher likes the sampled token more."""
    return (teacher_logprobs_N - old_logprobs_N).detach()


def topk_reverse_kl(student_NK: Tensor, teacher_NK: Tensor, tail: Literal["bucket", "none"]) -> Tensor:
    """Reverse KL(student || teacher) on the teacher's support, in nats (N,); gradient flows to the student only.

    Both inputs are full-vocabulary log-probs; slots where the teacher's is -inf are unused. ``bucket`` adds one bin
    for all mass outside the support, so the value is a lower bound of the full KL and equals it at K = V. ``none``
    renormalises both sides inside the support: mass outside it is then unconstrained.
    """
    used_NK = teacher_NK > -torch.inf
    log_p_NK = torch.where(used_NK, student_NK.float(), UNUSED)
    log_q_NK = torch.where(used_NK, teacher_NK.float(), UNUSED)
    if tail == "none":
        log_p_NK, log_q_NK = log_p_NK.log_softmax(-1), log_q_NK.log_softmax(-1)
    terms_NK = torch.where(used_NK, log_p_NK.exp() * (log_p_NK - log_q_NK), 0.0)
    inside_N = terms_NK.sum(-1)
    if tail == "none":
        return inside_N
    log_p_tail_N, log_q_tail_N = log_tail(log_p_NK), log_tail(log_q_NK)
    return inside_N + log_p_tail_N.exp() * (log_p_tail_N - log_q_tail_N)


def log_tail(logprobs_NK: Tensor) -> Tensor:
    """Log of the mass outside the support (N,), floored at ``TAIL_FLOOR``."""
    log_mass_N = logprobs_NK.logsumexp(-1).clamp(max=-TAIL_FLOOR)
    return torch.log(-torch.expm1(log_mass_N))
