"""The sign gate: extrapolate where verdict and teacher agree, fall back where they do not.

``sign_gate`` takes the verdict's sign from the group advantage, one per episode (SG-OPD, arXiv 2606.09304,
RECONSTRUCTED from its text); ``certificate`` takes it from the step's certificate where the verdict has one and from
the outcome elsewhere (DESIGN), which removes the one-sign-per-trajectory limitation that the paper names.

Consensus: ``delta + (lambda - 1)(log p_T - log p_ref)``. Conflict, by fallback: ``interp`` beta delta, ``mask`` 0,
``preserve`` the unboosted extrapolation, ``grpo`` the verifier's advantage. A divergence, which has no sign to move,
takes the same decisions as weights 1, beta or 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopd.config.objective_blocks import CertificateGate, SignGate
from agentopd.objective.views import Routed, Views


def gated(gate: SignGate | CertificateGate, views: Views, agreement_N: Tensor) -> Routed:
    """Route every token by the sign of its agreement (N,)."""
    delta_N = views.delta_N
    consensus_N, conflict_N = agreement_N > 0, agreement_N < 0
    if gate.gate_zero == "consensus":
        consensus_N = ~conflict_N
    elif gate.gate_zero == "conflict":
        conflict_N = ~consensus_N
    boosted_N = views.extrapolated(gate.extrapolation)
    flipped_N = consensus_N & (boosted_N * delta_N < 0)
    if gate.sign_guard:
        boosted_N = torch.where(flipped_N, delta_N, boosted_N)
    fallback_N = {
        "interp": gate.beta * delta_N,
        "mask": torch.zeros_like(delta_N),
        "preserve": views.extrapolated(views.base_factor),
        "grpo": views.advantage_N,
    }[gate.fallback]
    advantage_N = torch.where(consensus_N, boosted_N, torch.where(conflict_N, fallback_N, delta_N))
    direct_weight_N = torch.where(conflict_N, 0.0 if gate.fallback == "mask" else gate.beta, 1.0)
    return Routed(advantage_N, torch.ones_like(delta_N), agreement_N, direct_weight_N, flipped_N)
