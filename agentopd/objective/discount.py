"""Margins to come: ``A_t = sum over u >= t of gamma^(u - t) delta_u`` within an episode.

The sampled-token estimator of on-policy distillation with a discount (tinker cookbook ``kl_discount_factor``); 0, the
published default, is each token's own margin. Tokens that take no part add nothing and still count as time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted(delta_N: Tensor, row_N: Tensor, taking_part_N: Tensor, gamma: float) -> Tensor:
    """Discounted sum to the end of each token's episode (N,); rows are contiguous. The identity at ``gamma`` 0."""
    if gamma == 0 or not row_N.numel():
        return delta_N
    counts_B = torch.bincount(row_N)
    place_N = torch.arange(len(row_N), device=row_N.device) - (counts_B.cumsum(0) - counts_B)[row_N]
    delta_BL = delta_N.new_zeros(len(counts_B), int(counts_B.max()))
    delta_BL[row_N, place_N] = torch.where(taking_part_N, delta_N, 0.0)
    total_B, found_BL = torch.zeros_like(delta_BL[:, 0]), torch.empty_like(delta_BL)
    for place in range(delta_BL.shape[1] - 1, -1, -1):
        total_B = delta_BL[:, place] + gamma * total_B
        found_BL[:, place] = total_B
    return found_BL[row_N, place_N]
