"""Blocks into one loss: a sum of terms, each over all tokens of the batch with its own weights.

    loss = sum coef_D weight D(student, teacher)             loss/teacher
         + PPO(coef_V A_V + coef_D weight delta) TIS         loss/policy_gradient
         + alpha(step) NLL(gold or teacher trajectories)     loss/anchor
         + kl_coef k2(student, reference)                    loss/reference

A term whose block is off is left out. The teacher's weight is ``guidance``; its signal is an advantage for sampled
policy gradients and a divergence elsewhere. Source: algorithms.md, 12, 13.3 and 13.6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agentopd.config.objective import Blocks, anchor_coef
from agentopd.config.objective_blocks import NoAdvantage, SampledPG
from agentopd.config.objective_data import TeacherForwardKL
from agentopd.objective import metrics
from agentopd.objective.anchors import anchor_forward_kl, gold_nll
from agentopd.objective.guidance import Guidance, teacher_guidance
from agentopd.objective.phi import chord
from agentopd.objective.reference import k2
from agentopd.objective.signals import TokenMetrics, common_signals, teacher_signals
from agentopd.objective.streams import Streams
from agentopd.objective.trust import accepted, importance_weight, inside_trust_region, ppo_surrogate


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
class Term:
    """One term of the loss (scalar), and what it measured."""

    loss: Tensor
    metrics: TokenMetrics = field(default_factory=dict)


def compute_loss(streams: Streams, objective: Blocks) -> LossOutput:
    """Sum of the objective's terms over one micro-batch (scalar), with its parts and metrics.

    Pure: reads only its arguments. Gradient flows through ``logprobs_N``, ``topk_logprobs_NK`` and ``divergence_N``.
    """
    found = common_signals(streams, objective)
    guidance = teacher_guidance(streams, objective) if objective.needs_teacher else None
    if guidance is not None:
        found |= teacher_signals(streams, objective, guidance)
    parts: dict[str, Tensor] = {}
    for name, block in TERMS.items():
        term = block(streams, objective, guidance)
        if term is not None:
            parts[name] = term.loss
            found |= term.metrics
    loss = torch.stack(list(parts.values())).sum() if parts else streams.logprobs_N.sum() * 0.0
    return LossOutput(
        loss, {name: part.detach() for name, part in parts.items()}, metrics.token_sums(streams.batch, found)
    )


def teacher_term(streams: Streams, objective: Blocks, guidance: Guidance | None) -> Term | None:
    """The divergence on the tokens whose signal is one; None for pure policy gradients."""
    if guidance is None or (isinstance(objective.divergence, SampledPG) and objective.router.kind != "asymmetric"):
        return None
    assert objective.divergence.kind != "none"
    loss_N = objective.divergence.coef * (guidance.weight_N * guidance.scale_N) * guidance.signal_N
    return Term(torch.where(guidance.as_advantage_N, 0.0, loss_N).sum())


def policy_gradient(streams: Streams, objective: Blocks, guidance: Guidance | None) -> Term | None:
    """The clipped surrogate of the verifier's and the teacher's summed advantages; None where there are neither."""
    batch, stabiliser, verifier = streams.batch, objective.stabiliser, objective.verifier
    if isinstance(verifier, NoAdvantage) and not isinstance(objective.divergence, SampledPG):
        return None
    advantage_N = torch.zeros_like(batch.advantage_N)
    if not isinstance(verifier, NoAdvantage):
        advantage_N = verifier.coef * batch.verifier_scale_N * batch.advantage_N
    if guidance is not None and isinstance(objective.divergence, SampledPG):
        pressed_N = objective.divergence.coef * (guidance.weight_N * guidance.scale_N) * guidance.signal_N.detach()
        advantage_N = advantage_N + torch.where(guidance.as_advantage_N, pressed_N, 0.0)
    advantage_N = advantage_N.detach()
    surrogate = ppo_surrogate(advantage_N, streams.logprobs_N, streams.old_N, stabiliser)
    weight_N = importance_weight(streams.old_N, batch.rollout_logprobs_N, stabiliser.tis_cap)
    trusted_N = inside_trust_region(
        advantage_N, streams.logprobs_N, batch.rollout_logprobs_N, stabiliser.max_prob_drop
    ) & accepted(streams.old_N, batch.rollout_logprobs_N, stabiliser.rejection)
    active_N = advantage_N != 0
    found: TokenMetrics = {
        "pg/clip_frac": (surrogate.clipped_N, active_N),
        "pg/dropped": (~trusted_N, active_N),
        "pg/importance_weight": (weight_N, active_N),
    }
    return Term(torch.where(trusted_N, surrogate.loss_N * weight_N, 0.0).sum(), found)


def anchor_term(streams: Streams, objective: Blocks, guidance: Guidance | None) -> Term | None:
    """The supervised term on gold or teacher trajectories, at the strength of this step."""
    anchor, batch = objective.anchor, streams.batch
    if anchor.kind == "none":
        return None
    if isinstance(anchor, TeacherForwardKL):
        k = anchor.top_k
        student_NK, teacher_NK = streams.topk_logprobs_NK[:, :k], batch.teacher_topk_logprobs_NK[:, :k]
        loss = anchor_forward_kl(student_NK, teacher_NK, batch.anchor_scale_N)
    else:
        weighed = objective.stabiliser.phi != "off" and objective.stabiliser.phi_target != "pg"
        scale_N = batch.anchor_scale_N * chord(streams.old_N) if weighed else batch.anchor_scale_N
        loss = gold_nll(streams.logprobs_N, scale_N)
    found: TokenMetrics = {"anchor/nll": (-streams.logprobs_N, batch.anchor_scale_N > 0)}
    return Term(anchor_coef(anchor, streams.progress) * loss, found)


def reference_pull(streams: Streams, objective: Blocks, guidance: Guidance | None) -> Term | None:
    """The pull towards the frozen reference."""
    if objective.reference.kl_coef == 0:
        return None
    batch = streams.batch
    kl_N = k2(streams.logprobs_N, batch.ref_logprobs_N)
    loss = objective.reference.kl_coef * (batch.reference_scale_N * kl_N).sum()
    return Term(loss, {"reference/kl": (kl_N, batch.reference_scale_N > 0)})


TERMS: dict[str, Callable[[Streams, Blocks, Guidance | None], Term | None]] = {
    "loss/teacher": teacher_term,
    "loss/policy_gradient": policy_gradient,
    "loss/anchor": anchor_term,
    "loss/reference": reference_pull,
}
"""Every term a loss can have. Which ones it has depends on the objective alone, so ranks agree on the names."""
