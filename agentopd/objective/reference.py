"""A frozen reference policy: a pull towards it, and extrapolation away from it.

The pull is the k2 estimator of KL(student || reference), ``0.5 (log p_S - log p_ref)^2`` on the student's own samples,
differentiated directly: its expected gradient is that of the reverse KL (the derivative of k1 has expectation zero,
that of k3 is the forward KL's). Extrapolation is ExOPD's (arXiv 2602.12125): the optimum of its advantage over one
token is ``p_ref^(1 - lambda) p_T^lambda``, normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k2(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Per-token estimate in nats (N,), at least 0, with gradient to the student."""
    return 0.5 * (logprobs_N - ref_logprobs_N).square()


def k3(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """Per-token estimate of KL(student || reference) in nats (N,), at least 0 and of low variance; for reading only."""
    gap_N = (ref_logprobs_N - logprobs_N).detach().clamp(-20.0, 20.0)
    return gap_N.exp() - 1 - gap_N


def extrapolated(delta_N: Tensor, ref_margin_N: Tensor, factor: float | Tensor) -> Tensor:
    """``delta + (lambda - 1)(log p_T - log p_ref)`` (N,); with lambda 1 the margin ``delta`` itself."""
    if isinstance(factor, float) and factor == 1.0:
        return delta_N
    return delta_N + (factor - 1.0) * ref_margin_N


def span_factor(factor: float, span_N: Tensor, cap: float | None) -> float | Tensor:
    """Lambda of each token: at most ``cap`` inside tool calls, whose near-certain tokens overshoot first."""
    if cap is None or factor <= cap:
        return factor
    return torch.where(span_N, cap, factor)
