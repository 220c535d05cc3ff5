"""The anchor: supervised negative log-likelihood of gold trajectories."""

from __future__ import annotations

from torch import Tensor


def gold_nll(logprobs_N: Tensor, anchor_scale_N: Tensor) -> Tensor:
    """``-sum scale * log p_S`` (scalar, nats): the mean NLL of each skill's gold tokens, mixed by shares."""
    return -(anchor_scale_N * logprobs_N).sum()
