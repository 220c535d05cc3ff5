"""The router: what the verdict makes of the teacher's margin on each token.

A router turns the margin into a routed advantage (read by ``sampled_pg``) and a weight (which also multiplies a
divergence). It always reads the plain margin ``delta``, never the extrapolated one.

- ``uniform``: the (extrapolated) margin, weight 1.
- ``calibrated`` (DESIGN): ``w = w0 + (w1 - w0) max(0, a) + (w2 - w0) max(0, -a)`` with agreement
  ``a = sigma sign(delta)``: full weight where the verdict's sign and the teacher agree, little where they differ.
- ``outcome``: the same three weights by the verdict alone.
- ``asymmetric`` (AOPD, arXiv 2605.06387): the margin where it is positive; elsewhere a divergence takes over.

The sign gates are in ``gate``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentopd.config.objective_blocks import (
    AsymmetricRouter,
    CalibratedRouter,
    CertificateGate,
    OutcomeRouter,
    Router,
    SignGate,
    UniformRouter,
)
from agentopd.objective.gate import gated
from agentopd.objective.views import Routed, Views


def agreement(sigma_N: Tensor, delta_N: Tensor) -> Tensor:
    """Agreement of verdict and teacher in [-1, 1] (N,); 0 where either says nothing."""
    return sigma_N * delta_N.sign()


def three_weights(signed_N: Tensor, positive: float, neutral: float, negative: float) -> Tensor:
    """``neutral`` at 0, ``positive`` at 1 and ``negative`` at -1, linear in between (N,)."""
    return neutral + (positive - neutral) * signed_N.clamp(min=0) + (negative - neutral) * (-signed_N).clamp(min=0)


def route(router: Router, views: Views) -> Routed:
    """The routed advantage, weight and agreement of every token (N,), all detached."""
    return _ROUTERS[type(router)](router, views)


def _uniform(router: UniformRouter, views: Views) -> Routed:
    agreement_N = agreement(views.sigma_N, views.delta_N)
    return Routed(views.extrapolated(views.base_factor), torch.ones_like(views.delta_N), agreement_N)


def _calibrated(router: CalibratedRouter, views: Views) -> Routed:
    agreement_N = agreement(views.sigma_N, views.delta_N)
    weight_N = three_weights(agreement_N, router.w_agree, router.w_neutral, router.w_conflict)
    return Routed(views.extrapolated(views.base_factor), weight_N, agreement_N)


def _outcome(router: OutcomeRouter, views: Views) -> Routed:
    weight_N = three_weights(views.sigma_N, router.w_pass, router.w_unknown, router.w_fail)
    agreement_N = agreement(views.sigma_N, views.delta_N)
    return Routed(views.extrapolated(views.base_factor), weight_N, agreement_N)


def _asymmetric(router: AsymmetricRouter, views: Views) -> Routed:
    weight_N = torch.where(views.delta_N > 0, 1.0, router.eta)
    agreement_N = agreement(views.sigma_N, views.delta_N)
    return Routed(views.extrapolated(views.base_factor), weight_N, agreement_N)


def _by_advantage(router: SignGate, views: Views) -> Routed:
    return gated(router, views, agreement(views.advantage_N.sign(), views.delta_N))


def _by_certificate(router: CertificateGate, views: Views) -> Routed:
    return gated(router, views, agreement(views.sigma_N.sign(), views.delta_N))


_ROUTERS: dict[type, Callable[[Any, Views], Routed]] = {
    UniformRouter: _uniform,
    CalibratedRouter: _calibrated,
    OutcomeRouter: _outcome,
    AsymmetricRouter: _asymmetric,
    SignGate: _by_advantage,
    CertificateGate: _by_certificate,
}
