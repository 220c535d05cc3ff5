"""Whole distributions of two tokenizers over the segments they share (GOLD, TRL's trainer of that name).

A segment's merged distribution is the one at its first position times the probability of its own later tokens
(``observed``); in a segment of one token it is that token's distribution. Ids both have are compared by the
divergence; the masses of all others, sorted and padded with zeros, by their L1 distance. Merged masses do not add up
to 1, and are left so: each share of a Jensen-Shannon divergence is non-negative for any two masses.

Shapes: N segments, V the student's vocabulary, U the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopd.objective.alignment import segment_logprobs
from agentopd.objective.divergences import Kernel


def rest_logprobs(logprobs_N: Tensor, row_N: Tensor, segment_N: Tensor) -> Tensor:
    """Joint log-prob of the tokens of each token's segment but itself (N,); 0 in a segment of one. Differentiable."""
    total_N, _ = segment_logprobs(logprobs_N, row_N, segment_N)
    return total_N - logprobs_N


def gold_divergence(
    student_NV: Tensor,
    teacher_NU: Tensor,
    student_ids_U: Tensor | None,
    kernel: Kernel,
    matched_weight: float | None = None,
) -> Tensor:
    """``w D(matched) + (1 - w) sum |sorted rest|`` (N,), from merged log-probs; gradient to the student only.

    ``student_ids_U`` holds each teacher id's counterpart, or -1; None is the same id up to the shorter vocabulary.
    ``w`` defaults to the share of the teacher's ids that have one.
    """
    width = min(student_NV.shape[1], teacher_NU.shape[1])
    if student_ids_U is None:
        student_ids_U = torch.arange(teacher_NU.shape[1], device=teacher_NU.device)
        student_ids_U = torch.where(student_ids_U < width, student_ids_U, -1)
    theirs = (student_ids_U >= 0).nonzero().squeeze(1)
    ours = student_ids_U[theirs]
    weight = len(theirs) / len(student_ids_U) if matched_weight is None else matched_weight
    matched_N = kernel(student_NV[:, ours], teacher_NU[:, theirs].detach()).sum(-1)
    apart_N = (_sorted_rest(student_NV, ours, teacher_NU) - _sorted_rest(teacher_NU, theirs, student_NV).detach()).abs()
    return weight * matched_N + (1 - weight) * apart_N.sum(-1)


def _sorted_rest(logprobs: Tensor, matched: Tensor, other: Tensor) -> Tensor:
    """Masses of the ids without a counterpart, largest first, as wide as the wider of both vocabularies."""
    mass = logprobs.exp().index_fill(1, matched, 0.0).sort(dim=-1, descending=True).values
    return torch.nn.functional.pad(mass, (0, max(0, other.shape[1] - mass.shape[1])))
