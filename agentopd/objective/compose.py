"""Blocks into one loss.

    loss = PPO(eta_V A_V + eta_T w delta) TIS + eta_D w D(student, teacher) + c NLL(gold) + beta k2(student, reference)

The teacher enters either as an advantage (``sampled_pg``) or as a divergence (``topk_rkl``); in both cases its weight
is router x span x step x cap x sequence budget, all detached. Source: algorithms.md, 12, 13.2, 13.3 and 13.6. The
budget is taken on the capped pressure in both forms, so one token cannot use up its sequence's budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentopd.config.objective import Blocks as ObjectiveConfig
from agentopd.config.objective_blocks import GroupAdvantage, SampledPG, TopKReverseKL
from agentopd.config.objective_data import GoldNLL
from agentopd.objective import metrics
from agentopd.objective.anchors import gold_nll
from agentopd.objective.calibration import agreement, router_weight
from agentopd.objective.divergences import teacher_margin, topk_reverse_kl
from agentopd.objective.reference import k2
from agentopd.objective.streams import Streams
from agentopd.objective.trust import (
    MAX_LOG_RATIO,
    budget_scale,
    cap_scale,
    importance_weight,
    inside_trust_region,
    ppo_surrogate,
)
from agentopd.objective.weights import span_weights, step_weights

TokenMetrics = dict[str, tuple[Tensor, Tensor]]
"""Name to the value of each token (N,) and the flag of the tokens it is a mean over (N,)."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch, ready to be added to the others'.

    ``parts`` are the terms of ``loss`` (detached scalars, additive over micro-batches and ranks); ``sums`` hold every
    metric as (S, 2) sums and counts.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    sums: metrics.Sums


@dataclass(frozen=True)
class TeacherTerm:
    """The teacher's signal on each token (nats), its detached weight with the scale included, and its metrics."""

    signal_N: Tensor
    weight_N: Tensor
    metrics: TokenMetrics


def compute_loss(streams: Streams, objective: ObjectiveConfig) -> LossOutput:
    """Weighted sum of the objective's components over one micro-batch (scalar), with its parts and metrics.

    Pure: reads only its arguments. Gradient flows through ``logprobs_N`` and ``topk_logprobs_NK`` alone.
    """
    batch = streams.batch
    token_metrics = _common_metrics(streams, objective)
    parts: dict[str, Tensor] = {}
    advantage_N = torch.zeros_like(batch.advantage_N)
    if isinstance(objective.verifier, GroupAdvantage):
        advantage_N = objective.verifier.coef * batch.verifier_scale_N * batch.advantage_N
    divergence = objective.divergence
    if isinstance(divergence, SampledPG | TopKReverseKL):
        term = _teacher_term(streams, objective)
        token_metrics |= term.metrics
        if isinstance(divergence, TopKReverseKL):
            parts["loss/teacher"] = (divergence.coef * term.weight_N * term.signal_N).sum()
        else:
            advantage_N = advantage_N + divergence.coef * term.weight_N * term.signal_N
    if isinstance(divergence, SampledPG) or isinstance(objective.verifier, GroupAdvantage):
        parts["loss/policy_gradient"], found = _policy_gradient(streams, objective, advantage_N)
        token_metrics |= found
    if isinstance(objective.anchor, GoldNLL):
        parts["loss/anchor"] = objective.anchor.coef * gold_nll(streams.logprobs_N, batch.anchor_scale_N)
    if objective.reference.kl_coef > 0:
        kl_N = k2(streams.logprobs_N, batch.ref_logprobs_N)
        parts["loss/reference"] = objective.reference.kl_coef * (batch.reference_scale_N * kl_N).sum()
        token_metrics["reference/kl"] = (kl_N, batch.reference_scale_N > 0)
    loss = torch.stack(list(parts.values())).sum() if parts else streams.logprobs_N.sum() * 0.0
    sums = metrics.token_sums(batch, token_metrics)
    return LossOutput(loss, {name: part.detach() for name, part in parts.items()}, sums)


def _teacher_term(streams: Streams, objective: ObjectiveConfig) -> TeacherTerm:
    batch, divergence = streams.batch, objective.divergence
    part_N = batch.supervised_N
    delta_N = teacher_margin(batch.teacher_logprobs_N, streams.old_N)
    signal_N = delta_N
    if isinstance(divergence, TopKReverseKL):
        signal_N = topk_reverse_kl(streams.topk_logprobs_NK, batch.teacher_topk_logprobs_NK, divergence.tail)
    agreement_N = agreement(batch.sigma_N, delta_N)
    weight_N = router_weight(objective.router, agreement_N)
    weight_N = weight_N * span_weights(batch.span_N, objective.weights.outside_span)
    weight_N = weight_N * step_weights(delta_N, batch.row_N, batch.turn_N, part_N, objective.weights.step_delta)
    cap_N = cap_scale(signal_N, objective.stabiliser.cap)
    weight_N = weight_N * cap_N
    pressure_N = (weight_N * signal_N.detach()).abs()
    weight_N = weight_N * budget_scale(pressure_N, batch.row_N, part_N, objective.stabiliser.sequence_budget)
    kl_N = signal_N if isinstance(divergence, TopKReverseKL) else -delta_N
    found: TokenMetrics = {
        "distill/reverse_kl": (kl_N, part_N),
        "distill/weight": (weight_N, part_N),
        "distill/cap_hit": (cap_N < 1, part_N),
        "distill/agree": (agreement_N > 0, part_N),
        "distill/conflict": (agreement_N < 0, part_N),
        "distill/neutral": (agreement_N == 0, part_N),
    }
    return TeacherTerm(signal_N, (weight_N * batch.teacher_scale_N).detach(), found)


def _policy_gradient(streams: Streams, objective: ObjectiveConfig, advantage_N: Tensor) -> tuple[Tensor, TokenMetrics]:
    batch, stabiliser, advantage_N = streams.batch, objective.stabiliser, advantage_N.detach()
    surrogate = ppo_surrogate(advantage_N, streams.logprobs_N, streams.old_N, stabiliser)
    rollout_N = batch.rollout_logprobs_N
    weight_N = importance_weight(streams.old_N, rollout_N, stabiliser.tis_cap)
    trusted_N = inside_trust_region(advantage_N, streams.logprobs_N, rollout_N, stabiliser.max_prob_drop)
    active_N = advantage_N != 0
    found: TokenMetrics = {
        "pg/clip_frac": (surrogate.clipped_N, active_N),
        "pg/dropped": (~trusted_N, active_N),
        "pg/importance_weight": (weight_N, active_N),
    }
    return torch.where(trusted_N, surrogate.loss_N * weight_N, 0.0).sum(), found


def _common_metrics(streams: Streams, objective: ObjectiveConfig) -> TokenMetrics:
    batch, all_N = streams.batch, torch.ones_like(streams.batch.special_N)
    found: TokenMetrics = {
        "student/nll": (-streams.logprobs_N, all_N),
        "student/drift": ((streams.logprobs_N.detach() - streams.old_N).abs(), all_N),
    }
    if objective.source.kind == "student":
        # k3 of KL(rollout || learner) on rollout samples: at least 0, and 0 when engine and learner agree.
        gap_N = (streams.old_N - batch.rollout_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        found["student/mismatch_kl"] = (gap_N.exp() - 1 - gap_N, all_N)
    if objective.needs_teacher:
        found["distill/coverage"] = (batch.supervised_N, all_N)
        found["distill/masked_special"] = (batch.special_N & objective.masks.special_tokens, all_N)
    return found
