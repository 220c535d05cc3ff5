"""Per-token weights of the teacher term: by position, by agent turn, and by tool-call span.

Position weights are IW-OPD's (arXiv 2606.22600), ``1 + gamma (1 - C_t / C_T)`` with ``C_t`` the sum of ``|delta|``
before token t: early disagreement weighs more, between 1 and 1 + gamma.

Step weights are SOD's (arXiv 2605.07725), ``w_k = min((d_1 + eps) / (d_k + eps), 1 + delta)`` with ``d_k`` the mean
``|log p_S - log p_T|`` over turn k: the telescoped form of the product over turns. Turns on which student and teacher
drifted further apart than on the first count less.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_EPS = 1e-6
POSITION_EPS = 1e-8


def position_weights(gap_N: Tensor, row_N: Tensor, taking_part_N: Tensor, gamma: float) -> Tensor:
    """IW-OPD weights (N,), non-increasing along an episode; all ones when ``gamma`` is 0.

    ``gap_N`` is the signed or absolute log-prob difference; only tokens taking part count towards the sums.
    """
    if gamma == 0 or not row_N.numel():
        return torch.ones_like(gap_N)
    size_N = torch.where(taking_part_N, gap_N.detach().abs(), 0.0).double()
    total_B = size_N.new_zeros(int(row_N.max()) + 1).index_add(0, row_N, size_N)
    before_rows_B = total_B.cumsum(0) - total_B
    before_N = size_N.cumsum(0) - size_N - before_rows_B[row_N]
    share_N = (before_N / total_B[row_N].clamp(min=POSITION_EPS)).clamp(0.0, 1.0)
    return (1 + gamma * (1 - share_N)).to(gap_N.dtype)


def step_weights(
    gap_N: Tensor, row_N: Tensor, turn_N: Tensor, taking_part_N: Tensor, delta: float | None, floor: float = 0.0
) -> Tensor:
    """SOD weights (N,), constant inside a turn, 1 on tokens not taking part; all ones when ``delta`` is None.

    ``gap_N`` is the signed or absolute log-prob difference. The first turn is the first with a token taking part, and
    its mean gap counts as at least ``floor``.
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
    first_gap = mean_gap[first_step].clamp(min=floor)
    weight = ((first_gap + STEP_EPS) / (mean_gap + STEP_EPS)).clamp(max=1 + delta)
    weight = torch.where(torch.arange(len(step_ids), device=part.device) == first_step, 1.0, weight)
    return weight_N.index_put((part,), weight[step])


def span_weights(span_N: Tensor, outside: float) -> Tensor:
    """1 inside tool-call spans and ``outside`` elsewhere (N,)."""
    return torch.where(span_N, 1.0, outside)


def _segment_mean(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    zeros = values.new_zeros(num_segments)
    return zeros.index_add(0, segment, values) / zeros.index_add(0, segment, torch.ones_like(values))
