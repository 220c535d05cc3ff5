"""A divergence on K ids instead of the vocabulary, and what becomes of the mass outside them.

- ``bucket``: one more bin holds all of it; with K = V nothing is lost, and the value is a lower bound of the full one.
- ``none``: it is ignored. Renormalised, both sides are distributions on the support and mass outside is unconstrained;
  not renormalised, the truncated sum may be negative.
- ``sampled``: the sampled token joins the support. Not renormalised, its term is ``(log p - log q)`` weighted by a
  ratio of value 1, the unbiased correction of the truncated sum.

Source: Revisiting OPD (arXiv 2603.25562) and its code; the bucket as in TRL. Shapes: N tokens, K ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agentopd.config.objective_blocks import TopKForwardKL, TopKReverseKL
from agentopd.objective.divergences import Kernel, kernel, reverse_kl

UNUSED = -1e4
"""Finite stand-in for a log-prob of -inf: its exponential is exactly 0 in fp32 and its gradient is no NaN."""
TAIL_FLOOR = 1e-6
"""Mass below which a tail is rounding: sums of fp32 probabilities are good to a few times 1e-7."""


class Sampled(NamedTuple):
    """The sampled token: its id, and both sides' log-probs of it (N,)."""

    target_N: Tensor
    student_N: Tensor
    teacher_N: Tensor


def bucketed(student_NK: Tensor, teacher_NK: Tensor, kernel: Kernel = reverse_kl) -> Tensor:
    """The divergence on the used slots plus one bin for the rest (N,); gradient flows to the student only.

    Both inputs are full-vocabulary log-probs; slots where the teacher's is -inf are unused.
    """
    used_NK = teacher_NK > -torch.inf
    log_p_NK = torch.where(used_NK, student_NK.float(), UNUSED)
    log_q_NK = torch.where(used_NK, teacher_NK.float(), UNUSED)
    inside_N = torch.where(used_NK, kernel(log_p_NK, log_q_NK), 0.0).sum(-1)
    return inside_N + kernel(log_tail(log_p_NK), log_tail(log_q_NK))


def truncated(student_NK: Tensor, teacher_NK: Tensor, kernel: Kernel = reverse_kl, renormalise: bool = True) -> Tensor:
    """The divergence on the used slots alone (N,), by default with both sides normalised inside them."""
    used_NK = teacher_NK > -torch.inf
    log_p_NK = torch.where(used_NK, student_NK.float(), UNUSED)
    log_q_NK = torch.where(used_NK, teacher_NK.float(), UNUSED)
    if renormalise:
        log_p_NK, log_q_NK = log_p_NK.log_softmax(-1), log_q_NK.log_softmax(-1)
    return torch.where(used_NK, kernel(log_p_NK, log_q_NK), 0.0).sum(-1)


def topk_divergence(
    student_NK: Tensor,
    teacher_NK: Tensor,
    ids_NK: Tensor,
    sampled: Sampled,
    divergence: TopKReverseKL | TopKForwardKL,
) -> Tensor:
    """A configured divergence on the teacher's first ``top_k`` ids (N,), in nats."""
    student_NK, teacher_NK, ids_NK = (x[:, : divergence.top_k] for x in (student_NK, teacher_NK, ids_NK))
    chosen = kernel(divergence)
    if divergence.tail == "bucket":
        return bucketed(student_NK, teacher_NK, chosen)
    if divergence.tail == "none":
        return truncated(student_NK, teacher_NK, chosen, divergence.renormalise)
    outside_N = ~((ids_NK == sampled.target_N[:, None]) & (teacher_NK > -torch.inf)).any(-1)
    if divergence.renormalise:
        extra_N1 = torch.where(outside_N, sampled.teacher_N, -torch.inf)[:, None]
        return truncated(
            torch.cat([student_NK, sampled.student_N[:, None]], 1), torch.cat([teacher_NK, extra_N1], 1), chosen
        )
    inside_N = truncated(student_NK, teacher_NK, chosen, renormalise=False)
    gap_N = (sampled.student_N - sampled.teacher_N).detach()
    ratio_N = (sampled.student_N - sampled.student_N.detach()).exp()
    return inside_N + torch.where(outside_N, gap_N * ratio_N, 0.0)


def log_tail(logprobs_NK: Tensor) -> Tensor:
    """Log of the mass outside the support (N,), floored at ``TAIL_FLOOR``."""
    log_mass_N = logprobs_NK.logsumexp(-1).clamp(max=-TAIL_FLOOR)
    return torch.log(-torch.expm1(log_mass_N))


def overlap(student_ids_NK: Tensor, teacher_ids_NK: Tensor) -> Tensor:
    """Share of the student's K ids that are among the teacher's (N,): ``|S_S and S_T| / K`` (Rethinking OPD)."""
    return (student_ids_NK[:, :, None] == teacher_ids_NK[:, None, :]).any(-1).float().mean(-1)
