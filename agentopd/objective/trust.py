"""Bounds on one update: the PPO surrogate, the importance weight of the engine gap, and caps on teacher pressure.

Everything but the surrogate's ratio is detached. Each bound is the identity when its setting is None.
Sources: PPO with dual clip as in verl ``compute_policy_loss_vanilla``; truncated importance sampling as in verl and
G-OPD; the probability-drop mask as in prime-rl ``ref_kl_loss_fn``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agentopd.config.objective_blocks import Stabiliser

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before the exponential, so that it cannot overflow."""


@dataclass(frozen=True)
class Surrogate:
    """The clipped loss of each token (N,), and which tokens the clip holds."""

    loss_N: Tensor
    clipped_N: Tensor


def ppo_surrogate(advantage_N: Tensor, logprobs_N: Tensor, old_N: Tensor, stabiliser: Stabiliser) -> Surrogate:
    """``max(-A r, -A clip(r, 1-lo, 1+hi))``, and for A < 0 at most ``-A c`` (dual clip).

    Homogeneous in A: scaling the advantage by a token's weight scales its loss by it, so weighted advantages of
    several components may be summed before the clip.
    """
    ratio_N = (logprobs_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio_N = ratio_N.clamp(1 - stabiliser.clip_low, 1 + stabiliser.clip_high)
    plain_N, clipped_N = -advantage_N * ratio_N, -advantage_N * clipped_ratio_N
    loss_N = torch.maximum(plain_N, clipped_N)
    held_N = clipped_N > plain_N
    if stabiliser.dual_clip is not None:
        ceiling_N = -advantage_N * stabiliser.dual_clip
        over_N = (advantage_N < 0) & (loss_N > ceiling_N)
        loss_N = torch.where(over_N, ceiling_N, loss_N)
        held_N = held_N | over_N
    return Surrogate(loss_N, held_N.detach())


def importance_weight(old_N: Tensor, rollout_N: Tensor, cap: float | None) -> Tensor:
    """Truncated importance weight of the learner/engine gap, ``min(exp(old - rollout), cap)`` (N,); no lower bound."""
    if cap is None:
        return torch.ones_like(old_N)
    return (old_N - rollout_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap).detach()


def accepted(old_N: Tensor, rollout_N: Tensor, bound: float | None) -> Tensor:
    """False on tokens whose learner/engine ratio lies outside [1/bound, bound] (N,)."""
    if bound is None:
        return torch.ones_like(old_N, dtype=torch.bool)
    return (old_N - rollout_N).abs().detach() <= math.log(bound)


def inside_trust_region(advantage_N: Tensor, logprobs_N: Tensor, rollout_N: Tensor, max_drop: float | None) -> Tensor:
    """False on tokens whose probability already moved by ``max_drop`` in the direction of their advantage (N,)."""
    if max_drop is None:
        return torch.ones_like(advantage_N, dtype=torch.bool)
    moved_N = (logprobs_N.exp() - rollout_N.exp()).detach()
    return ~(((advantage_N > 0) & (moved_N > max_drop)) | ((advantage_N < 0) & (moved_N < -max_drop)))


def cap_scale(signal_N: Tensor, cap: float | None, shape: str = "hard") -> Tensor:
    """Factor in (0, 1] that brings ``|signal|`` down to ``cap`` (N,), detached.

    On a divergence it scales the gradient rather than clamping the value, which would lose the gradient altogether;
    on an advantage it is the hard clip, or with shape ``tanh`` ``cap tanh(signal / cap)``.
    """
    if cap is None:
        return torch.ones_like(signal_N)
    if shape == "tanh":
        relative_N = signal_N.detach().abs().clamp(min=1e-6) / cap
        return relative_N.tanh() / relative_N
    return (cap / signal_N.detach().abs()).clamp(max=1.0)


def budget_scale(pressure_N: Tensor, row_N: Tensor, taking_part_N: Tensor, budget: float | None) -> Tensor:
    """``min(1, budget / mean pressure of the token's sequence)`` (N,), the mean over tokens taking part."""
    if budget is None:
        return torch.ones_like(pressure_N)
    num_rows = int(row_N.max()) + 1 if row_N.numel() else 0
    zeros_B = pressure_N.new_zeros(num_rows)
    total_B = zeros_B.index_add(0, row_N, torch.where(taking_part_N, pressure_N.detach(), 0.0))
    count_B = zeros_B.index_add(0, row_N, taking_part_N.to(pressure_N.dtype))
    mean_B = total_B / count_B.clamp(min=1)
    return (budget / mean_B).clamp(max=1.0)[row_N]
