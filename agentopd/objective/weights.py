"""Per-token weights of the teacher term: by agent turn, and by tool-call span.

Step weights are SOD's (arXiv 2605.07725), ``w_k = min((d_1 + eps) / (d_k + eps), 1 + delta)`` with ``d_k`` the mean
``|log p_S - log p_T|`` over turn k: the telescoped form of the product over turns. Turns on which student and teacher
drifted further apart than on the first count less.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_EPS = 1e-6


def step_weights(gap_N: Tensor, row_N: Tensor, turn_N: Tensor, taking_part_N: Tensor, delta: float | None) -> Tensor:
    """SOD weights (N,), constant inside a turn, 1 on tokens not taking part; all ones when ``delta`` is None.

    ``gap_N`` is the signed or absolute log-prob difference. The first turn is the first with a token taking part.
    """
    weight_N = torch.ones_like(gap_N)
    if delta is None or not bool(taking_part_N.any()):
        return weight_N
    part = taking_part_N.nonzero().squeeze(1)
    stride = int(turn_N.max()) + 1
    step_ids, step = torch.unique(row_N[part] * stride + turn_N[part], return_inverse=True)
    mean_gap = _segment_mean(gap_N[part].detach().abs(), step, len(step_ids))
    row_of_step = torch.div(step_ids, stride, rounding_mode="floor")
    first_step = torch.searchsorted(row_of_step, row_of_step)
    weight = ((mean_gap[first_step] + STEP_EPS) / (mean_gap + STEP_EPS)).clamp(max=1 + delta)
    return weight_N.index_put((part,), weight[step])


def span_weights(span_N: Tensor, outside: float) -> Tensor:
    """1 inside tool-call spans and ``outside`` elsewhere (N,)."""
    return torch.where(span_N, 1.0, outside)


def _segment_mean(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    zeros = values.new_zeros(num_segments)
    return zeros.index_add(0, segment, values) / zeros.index_add(0, segment, torch.ones_like(values))
