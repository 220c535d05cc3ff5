"""The teacher term: a signal on every token, as an advantage or as a divergence, and its detached weight.

``weight = router x span x step x position x phi x cap x budget x scale``. The router reads the plain margin; phi, cap
and budget read the routed signal. The budget is taken on the capped pressure, so one token cannot use up its
sequence's budget. Source: algorithms.md, 12, 13.2 and 13.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentopd.config.objective import Blocks
from agentopd.config.objective_blocks import SampledPG
from agentopd.objective.alignment import segment_logprobs
from agentopd.objective.divergences import teacher_margin
from agentopd.objective.masks import most_uncertain
from agentopd.objective.phi import mean_of, phi, weighted_sums
from agentopd.objective.routers import route
from agentopd.objective.streams import Streams
from agentopd.objective.teacher_signal import pressure, teacher_signal
from agentopd.objective.trust import budget_scale, cap_scale
from agentopd.objective.views import Routed, Views
from agentopd.objective.weights import position_weights, span_weights, step_weights


@dataclass(frozen=True)
class Guidance:
    """The teacher's signal on each token (nats, with gradient where it is a divergence) and what became of it."""

    signal_N: Tensor
    weight_N: Tensor
    """Detached."""
    scale_N: Tensor
    """The token's share of the loss; 0 where it takes no part."""
    as_advantage_N: Tensor
    """Where the signal enters as an advantage; elsewhere it is a loss itself."""
    part_N: Tensor
    """Tokens that take part."""
    delta_N: Tensor
    routed: Routed
    capped_N: Tensor


def teacher_guidance(streams: Streams, objective: Blocks) -> Guidance:
    """The teacher term of a micro-batch. Pure; every factor but the divergence itself is detached."""
    batch, stabiliser = streams.batch, objective.stabiliser
    delta_N, routed = _routed(streams, objective)
    signal_N, as_advantage_N = teacher_signal(streams, objective, routed, delta_N)
    part_N, scale_N = _taking_part(streams, objective)
    weight_N = routed.weight_N
    if routed.direct_weight_N is not None and not isinstance(objective.divergence, SampledPG):
        weight_N = routed.direct_weight_N
    weight_N = _shaped(weight_N, delta_N, streams, objective)
    if stabiliser.phi != "off" and stabiliser.phi_target != "anchor":
        phi_N = phi(stabiliser, signal_N, streams.old_N)
        mean = mean_of(weighted_sums(phi_N, scale_N)) if streams.phi_mean is None else streams.phi_mean
        weight_N = weight_N * phi_N / mean
    felt_N = pressure(signal_N, streams, objective)
    cap_N = cap_scale(felt_N, stabiliser.cap, stabiliser.cap_shape)
    weight_N = weight_N * cap_N
    weight_N = weight_N * budget_scale((weight_N * felt_N).abs(), batch.row_N, part_N, stabiliser.sequence_budget)
    weight_N = weight_N.detach()
    return Guidance(signal_N, weight_N, scale_N, as_advantage_N, part_N, delta_N, routed, cap_N < 1)


def phi_sums(streams: Streams, objective: Blocks) -> Tensor:
    """What a micro-batch adds to the batch's mean of phi (2,); see ``phi.weighted_sums``."""
    delta_N, routed = _routed(streams, objective)
    signal_N, _ = teacher_signal(streams, objective, routed, delta_N)
    _, scale_N = _taking_part(streams, objective)
    return weighted_sums(phi(objective.stabiliser, signal_N, streams.old_N), scale_N).detach()


def _taking_part(streams: Streams, objective: Blocks) -> tuple[Tensor, Tensor]:
    """Tokens of the teacher term, and their scale."""
    batch, ratio = streams.batch, objective.masks.entropy_top_ratio
    part_N = batch.supervised_N
    if ratio is None:
        return part_N, batch.teacher_scale_N
    assert streams.entropy_N is not None  # the learner measures it where the objective needs it
    part_N = most_uncertain(streams.entropy_N, batch.row_N, part_N, ratio)
    return part_N, torch.where(part_N, batch.teacher_scale_N, 0.0)


def _shaped(weight_N: Tensor, delta_N: Tensor, streams: Streams, objective: Blocks) -> Tensor:
    """Weights by span, turn and position on top of the router's."""
    batch, weights, row_N = streams.batch, objective.weights, streams.batch.row_N
    part_N = batch.supervised_N
    weight_N = weight_N * span_weights(batch.span_N, weights.outside_span)
    step_N = step_weights(delta_N, row_N, batch.turn_N, part_N, weights.step_delta, weights.step_floor)
    return weight_N * step_N * position_weights(delta_N, row_N, part_N, weights.position_gamma)


def _routed(streams: Streams, objective: Blocks) -> tuple[Tensor, Routed]:
    batch, reference = streams.batch, objective.reference
    own_N = streams.old_N
    if objective.alignment.kind != "same":
        own_N, _ = segment_logprobs(own_N, batch.row_N, batch.segment_N)
    delta_N = teacher_margin(batch.teacher_logprobs_N, own_N)
    ref_margin_N = batch.teacher_logprobs_N - batch.ref_logprobs_N if objective.needs_reference else delta_N * 0
    views = Views(
        delta_N,
        ref_margin_N,
        batch.sigma_N,
        batch.advantage_N,
        batch.span_N,
        reference.extrapolation,
        reference.span_extrapolation,
    )
    return delta_N, route(objective.router, views)
