"""Detached token weights that keep a few large margins from carrying the update.

``inv_abs``: ``min(1, c / |A|)`` on the routed advantage (SG-OPD, arXiv 2606.09304, RECONSTRUCTED); ``chord``:
``p (1 - p)`` of the token's own probability, largest where the student is undecided (CHORD, arXiv 2508.11408). Either
is divided by its mean over the batch, so the mean weight is 1. That mean is over all micro-batches and ranks: the
learner measures it in a first look at the batch, and a lone micro-batch uses its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopd.config.objective_blocks import Stabiliser


def phi(stabiliser: Stabiliser, advantage_N: Tensor, old_N: Tensor) -> Tensor:
    """The weight of each token before its mean is divided out (N,), in (0, 1]; all ones when off."""
    if stabiliser.phi == "inv_abs":
        return (stabiliser.phi_scale / advantage_N.detach().abs()).clamp(max=1.0)
    return chord(old_N) if stabiliser.phi == "chord" else torch.ones_like(old_N)


def chord(logprobs_N: Tensor) -> Tensor:
    """``p (1 - p)`` (N,): 0.25 at p = 1/2 and 0 at certainty."""
    p_N = logprobs_N.detach().exp()
    return p_N * (1 - p_N)


def weighted_sums(phi_N: Tensor, scale_N: Tensor) -> Tensor:
    """``(sum scale phi, sum scale)`` (2,): adds up over micro-batches and ranks to the mean of phi."""
    return torch.stack([torch.where(scale_N > 0, scale_N * phi_N, 0.0).sum(), scale_N.sum()])


def mean_of(sums: Tensor) -> Tensor:
    """The mean that ``weighted_sums`` add up to (scalar); 1 where nothing takes part."""
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-12), 1.0).clamp(min=1e-12)
