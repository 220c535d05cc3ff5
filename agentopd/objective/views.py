"""What routers read of a token, and what they make of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from agentopd.objective.reference import extrapolated, span_factor


class Views(NamedTuple):
    """The teacher's, the verdict's and the reference's view of every token (N,), all detached."""

    delta_N: Tensor
    """``log p_T - log p_S``, in nats."""
    ref_margin_N: Tensor
    """``log p_T - log p_ref``, in nats; 0 where no reference is read."""
    sigma_N: Tensor
    advantage_N: Tensor
    """The verifier's advantage, without its coefficient."""
    span_N: Tensor
    base_factor: float = 1.0
    """lambda of ``reference.extrapolation``."""
    span_cap: float | None = None

    def extrapolated(self, factor: float) -> Tensor:
        """The margin moved ``factor`` times as far from the reference as the teacher is (N,)."""
        return extrapolated(self.delta_N, self.ref_margin_N, span_factor(factor, self.span_N, self.span_cap))


class Routed(NamedTuple):
    """A router's finding on every token (N,), detached."""

    advantage_N: Tensor
    weight_N: Tensor
    agreement_N: Tensor
    """Above 0 consensus, below 0 conflict, 0 neutral."""
    direct_weight_N: Tensor | None = None
    """The weight on a divergence, where it is another than on an advantage."""
    flipped_N: Tensor | None = None
    """Consensus tokens whose extrapolated margin has the other sign; None for routers that do not extrapolate."""
