"""The teacher's signal on each token before any weight: a routed advantage, or a divergence with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agentopd.config.objective import Blocks
from agentopd.config.objective_blocks import (
    AsymmetricRouter,
    CandidatesPG,
    JensenShannon,
    SampledPG,
    TopKForwardKL,
    TopKReverseKL,
)
from agentopd.objective.alignment import segment_logprobs, with_span_slot
from agentopd.objective.candidates import candidate_loss, candidate_rewards
from agentopd.objective.discount import discounted
from agentopd.objective.divergences import forward_kl, k2_direct, kernel
from agentopd.objective.streams import Streams
from agentopd.objective.support import Sampled, bucketed, topk_divergence, truncated
from agentopd.objective.trust import accepted, importance_weight
from agentopd.objective.views import Routed


def teacher_signal(streams: Streams, objective: Blocks, routed: Routed, delta_N: Tensor) -> tuple[Tensor, Tensor]:
    """The signal of each token in nats (N,), and whether it enters as an advantage (N,) or is a loss itself."""
    yes_N = torch.ones_like(delta_N, dtype=torch.bool)
    if not isinstance(objective.divergence, SampledPG):
        return _DIRECT[objective.divergence.kind](streams, objective), ~yes_N
    if not isinstance(objective.router, AsymmetricRouter):
        batch, gamma = streams.batch, objective.divergence.discount
        return discounted(routed.advantage_N.detach(), batch.row_N, batch.supervised_N, gamma), yes_N
    k = objective.router.top_k
    student_NK, teacher_NK = streams.topk_logprobs_NK[:, :k], streams.batch.teacher_topk_logprobs_NK[:, :k]
    pulled_N = truncated(student_NK, teacher_NK, forward_kl, objective.router.renormalise)
    return torch.where(delta_N > 0, routed.advantage_N.detach(), pulled_N), delta_N > 0


def pressure(signal_N: Tensor, streams: Streams, objective: Blocks) -> Tensor:
    """What cap and budget hold down (N,), in nats, detached: the signal, but that of candidates with a baseline.

    Rewards with a baseline sum to nothing, so their signal is 0 however hard they push: there it is the sum of sizes.
    """
    divergence = objective.divergence
    if not (isinstance(divergence, CandidatesPG) and divergence.baseline):
        return signal_N.detach()
    old_NK, teacher_NK = streams.old_topk_NK, streams.batch.teacher_topk_logprobs_NK
    return candidate_rewards(old_NK[:, : divergence.width], teacher_NK[:, : divergence.width], divergence).abs().sum(-1)


def _topk(streams: Streams, objective: Blocks) -> Tensor:
    batch, divergence = streams.batch, objective.divergence
    assert isinstance(divergence, TopKReverseKL | TopKForwardKL)
    if objective.alignment.kind != "same":
        k = divergence.top_k
        score_N, several_N = segment_logprobs(streams.logprobs_N, batch.row_N, batch.segment_N)
        spans_N2 = torch.stack([score_N, batch.teacher_logprobs_N], -1)
        supports = with_span_slot(
            streams.topk_logprobs_NK[:, :k], batch.teacher_topk_logprobs_NK[:, :k], spans_N2, several_N
        )
        if divergence.tail == "bucket":
            return bucketed(*supports, kernel(divergence))
        return truncated(*supports, kernel(divergence), divergence.renormalise)
    sampled = Sampled(batch.target_N, streams.logprobs_N, batch.teacher_logprobs_N)
    return topk_divergence(
        streams.topk_logprobs_NK, batch.teacher_topk_logprobs_NK, batch.teacher_topk_ids_NK, sampled, divergence
    )


def _whole(streams: Streams, objective: Blocks) -> Tensor:
    divergence = objective.divergence
    if isinstance(divergence, JensenShannon) and divergence.top_k is not None:
        k = divergence.top_k
        teacher_NK = streams.batch.teacher_topk_logprobs_NK[:, :k]
        return bucketed(streams.topk_logprobs_NK[:, :k], teacher_NK, kernel(divergence))
    assert streams.divergence_N is not None  # the learner compares whole distributions where the objective needs it
    return streams.divergence_N


def _candidates(streams: Streams, objective: Blocks) -> Tensor:
    divergence, stabiliser, batch = objective.divergence, objective.stabiliser, streams.batch
    assert isinstance(divergence, CandidatesPG)
    width = divergence.width
    loss_N = candidate_loss(
        streams.topk_logprobs_NK[:, :width],
        streams.old_topk_NK[:, :width],
        batch.teacher_topk_logprobs_NK[:, :width],
        divergence,
        stabiliser,
    )
    kept_N = accepted(streams.old_N, batch.rollout_logprobs_N, stabiliser.rejection)
    return torch.where(
        kept_N, loss_N * importance_weight(streams.old_N, batch.rollout_logprobs_N, stabiliser.tis_cap), 0
    )


def _k2(streams: Streams, objective: Blocks) -> Tensor:
    return k2_direct(streams.logprobs_N, streams.batch.teacher_logprobs_N)


_DIRECT: dict[str, Callable[[Streams, Blocks], Tensor]] = {
    "topk_rkl": _topk,
    "topk_fkl": _topk,
    "jsd": _whole,
    "full_rkl": _whole,
    "full_fkl": _whole,
    "candidates_pg": _candidates,
    "k2_direct": _k2,
}
