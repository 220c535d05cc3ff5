"""How far the student is from the teacher at one token: kernels on log-probs, summed over whatever support there is.

A kernel gives each id's share of a divergence; ``support`` says which ids there are. ``sampled_pg`` reads one number a
token, ``log p_T - log p_S`` of the token sampled: used as a policy-gradient advantage its expected gradient is that of
the per-token reverse KL, and so is that of ``k2_direct`` differentiated. Sources: GKD (arXiv 2306.13649) for the
generalised JSD in TRL's convention; Revisiting OPD (arXiv 2603.25562) for the divergences on a support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from agentopd.config.objective_blocks import (
    Divergence,
    FullForwardKL,
    JensenShannon,
    TopKForwardKL,
    TopKReverseKL,
)

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Student's and teacher's log-probs of some ids to each id's share of the divergence, same shape, in nats."""

KernelWithSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same, and how each share changes with the student's log-prob."""


def teacher_margin(teacher_logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """``delta = log p_T - log p_S`` (N,), detached; positive where the teacher likes the sampled token more."""
    return (teacher_logprobs_N - old_logprobs_N).detach()


def k2_direct(logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> Tensor:
    """``0.5 (log p_S - log p_T)^2`` at the sampled token (N,): in expectation the gradient of the reverse KL."""
    return 0.5 * (logprobs_N - teacher_logprobs_N).square()


def reverse_kl(log_p: Tensor, log_q: Tensor, clip: float | None = None) -> Tensor:
    """``p (log p - log q)``: KL(student || teacher); ``clip`` clamps the log-ratio."""
    return log_p.exp() * _clamped(log_p - log_q, clip)


def forward_kl(log_p: Tensor, log_q: Tensor, clip: float | None = None) -> Tensor:
    """``q (log q - log p)``: KL(teacher || student); ``clip`` clamps the log-ratio."""
    return log_q.exp() * _clamped(log_q - log_p, clip)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """``beta KL(T || M) + (1 - beta) KL(S || M)``, ``M = beta T + (1 - beta) S``; 0 and 1 are forward and reverse KL.

    Those two are special cases and not limits: towards them this divergence vanishes.
    """
    if beta == 0:
        return forward_kl(log_p, log_q)
    if beta == 1:
        return reverse_kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * forward_kl(log_m, log_q) + (1 - beta) * reverse_kl(log_p, log_m)


def with_slope(divergence: Divergence) -> KernelWithSlope:
    """The kernel of a divergence over whole distributions, and its slope, in closed form.

    Both log-probs are overwritten. ``d/d log p``: reverse ``p (log p - log q) + p``, forward ``-q``, Jensen-Shannon
    ``(1 - beta) p (log p - log m)``, for there the changes by way of the mixture cancel.
    """
    beta = divergence.beta if isinstance(divergence, JensenShannon) else None
    if beta == 0 or isinstance(divergence, FullForwardKL):
        return _forward_with_slope
    if beta is None or beta == 1:
        return _reverse_with_slope
    return _jensen_shannon_at(beta)


@cache
def _jensen_shannon_at(beta: float) -> KernelWithSlope:
    """One function for each ``beta``, so that what is compiled for it is found again."""
    return lambda log_p, log_q: _jensen_shannon_with_slope(log_p, log_q, beta)


def _reverse_with_slope(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p)
    return value, p.add_(value)


def _forward_with_slope(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    value = log_q.sub_(log_p).mul_(q)
    return value, q.neg_()


def _jensen_shannon_with_slope(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp().mul_(1 - beta), log_q.exp().mul_(beta)
    # An id that both give no mass at all has a share of 0, not of 0 times infinity.
    log_m = torch.add(p, q).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    slope = log_p.sub_(log_m).mul_(p)
    return log_q.sub_(log_m).mul_(q).add_(slope), slope


def kernel(divergence: Divergence) -> Kernel:
    """The kernel of a configured divergence."""
    if isinstance(divergence, JensenShannon):
        return lambda log_p, log_q: jensen_shannon(log_p, log_q, divergence.beta)
    plain = forward_kl if isinstance(divergence, TopKForwardKL | FullForwardKL) else reverse_kl
    clip = divergence.clip_log_ratio if isinstance(divergence, TopKForwardKL | TopKReverseKL) else None
    return plain if clip is None else lambda log_p, log_q: plain(log_p, log_q, clip)


def full_divergence(student_logits_NV: Tensor, teacher_logits_NV: Tensor, divergence: Divergence) -> Tensor:
    """Over the whole vocabulary (N,), with gradient to the student.

    Only ids that both have are compared: rows beyond the smaller of the two vocabularies are padding, and are cut
    before the softmax.
    """
    width = min(student_logits_NV.shape[-1], teacher_logits_NV.shape[-1])
    log_p_NV = student_logits_NV[..., :width].float().log_softmax(-1)
    log_q_NV = teacher_logits_NV[..., :width].float().log_softmax(-1)
    return kernel(divergence)(log_p_NV, log_q_NV.detach()).sum(-1)


def _clamped(log_ratio: Tensor, clip: float | None) -> Tensor:
    return log_ratio if clip is None else log_ratio.clamp(-clip, clip)
