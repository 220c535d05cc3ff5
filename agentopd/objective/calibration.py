"""The router: how much of the teacher's guidance a token takes, given the verdict.

Verifier-calibrated weights (algorithms.md, 13.2): with ``sigma`` the verdict's sign and ``delta`` the teacher's
preference for the sampled token, agreement is ``a = sigma * sign(delta)`` and
``w = w0 + (w1 - w0) max(0, a) + (w2 - w0) max(0, -a)``. On a passed episode a token the teacher endorses counts in
full and one it would suppress counts little; on a failed one the other way round; an unknown verdict is neutral.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopd.config.objective_blocks import CalibratedRouter, UniformRouter


def agreement(sigma_N: Tensor, delta_N: Tensor) -> Tensor:
    """Agreement of verdict and teacher in [-1, 1] (N,); 0 where either says nothing."""
    return sigma_N * delta_N.sign()


def router_weight(router: UniformRouter | CalibratedRouter, agreement_N: Tensor) -> Tensor:
    """Weight of the teacher term (N,), at least 0; all ones for the uniform router."""
    if isinstance(router, UniformRouter):
        return torch.ones_like(agreement_N)
    w0, w1, w2 = router.w_neutral, router.w_agree, router.w_conflict
    return w0 + (w1 - w0) * agreement_N.clamp(min=0) + (w2 - w0) * (-agreement_N).clamp(min=0)
