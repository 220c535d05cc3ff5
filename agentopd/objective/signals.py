"""What a reader of a run wants to see of every micro-batch: one (value, taking part) pair of streams per metric.

Per skill, and for the teacher's signals also per token class (``/in_call`` inside tool calls, ``/outside`` elsewhere).
"""

from __future__ import annotations

import torch
from torch import Tensor

from agentopd.config.objective import Blocks
from agentopd.objective.guidance import Guidance
from agentopd.objective.reference import k3
from agentopd.objective.streams import Streams
from agentopd.objective.trust import MAX_LOG_RATIO

TokenMetrics = dict[str, tuple[Tensor, Tensor]]
"""Name to the value of each token (N,) and the flag of the tokens it is a mean over (N,)."""

BY_CLASS = ("reverse_kl", "agree", "conflict", "neutral")
"""Signals of the teacher that are split by token class."""


def common_signals(streams: Streams, objective: Blocks) -> TokenMetrics:
    """The student alone: likelihood, drift over passes, gap to the engine, KL to the start, teacher coverage."""
    batch = streams.batch
    policy_N, all_N = batch.policy_N, torch.ones_like(batch.policy_N)
    found: TokenMetrics = {
        "student/nll": (-streams.logprobs_N, all_N),
        "student/drift": ((streams.logprobs_N.detach() - streams.old_N).abs(), all_N),
    }
    if objective.source.kind == "student":
        # k3 of KL(rollout || learner) on rollout samples: at least 0, and 0 when engine and learner agree.
        gap_N = (streams.old_N - batch.rollout_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        found["student/mismatch_kl"] = (gap_N.exp() - 1 - gap_N, policy_N)
    if objective.needs_reference and objective.reference.policy == "start":
        found["student/kl_to_start"] = (k3(streams.logprobs_N, batch.ref_logprobs_N), policy_N)
    if objective.needs_teacher:
        found["distill/coverage"] = (batch.supervised_N, policy_N)
        found["distill/masked_special"] = (batch.special_N & objective.masks.special_tokens, policy_N)
    return found


def teacher_signals(streams: Streams, objective: Blocks, guidance: Guidance) -> TokenMetrics:
    """The teacher term: divergence, weight, caps hit, consensus and conflict, and how much mass the support holds."""
    batch, part_N, agreement_N = streams.batch, guidance.part_N, guidance.routed.agreement_N
    exact = objective.divergence.kind in ("topk_rkl", "full_rkl")
    found: TokenMetrics = {
        "distill/reverse_kl": (guidance.signal_N if exact else -guidance.delta_N, part_N),
        "distill/weight": (guidance.weight_N, part_N),
        "distill/cap_hit": (guidance.capped_N, part_N),
        "distill/agree": (agreement_N > 0, part_N),
        "distill/conflict": (agreement_N < 0, part_N),
        "distill/neutral": (agreement_N == 0, part_N),
    }
    for name in BY_CLASS:
        value_N = found[f"distill/{name}"][0]
        found[f"distill/{name}/in_call"] = (value_N, part_N & batch.span_N)
        found[f"distill/{name}/outside"] = (value_N, part_N & ~batch.span_N)
    if objective.top_k:
        used_NK = batch.teacher_topk_logprobs_NK > -torch.inf
        teacher_N = batch.teacher_topk_logprobs_NK.exp().sum(-1)
        student_N = torch.where(used_NK, streams.topk_logprobs_NK.detach().exp(), 0.0).sum(-1)
        found |= {"distill/teacher_mass": (teacher_N, part_N), "distill/student_mass": (student_N, part_N)}
    if objective.student_top_k and objective.top_k:
        found["distill/overlap"] = (batch.overlap_N, part_N)
    if guidance.routed.flipped_N is not None:
        found["distill/sign_flips"] = (guidance.routed.flipped_N, part_N)
    return found
