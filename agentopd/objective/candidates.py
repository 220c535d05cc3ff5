"""Rewards on K candidate ids a token, each with its own clipped ratio (Rethinking OPD, arXiv 2604.13016).

``reward_v = weight_v (log q_v - log p_v)`` on a support of the student's and the teacher's top-K ids, summed over the
support without renormalisation. With the student's own weight and the ratio at 1 this is the exact reverse-KL gradient
on the support up to a baseline; ``baseline`` subtracts the mean reward and divides by the support's mass, which
reproduces the gradient of the renormalised divergence. Shapes: N tokens, K candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentopd.config.objective_blocks import CandidatesPG, Stabiliser
from agentopd.objective.trust import inside_trust_region, ppo_surrogate

Ids = npt.NDArray[np.int64]
LogProbs = npt.NDArray[np.float32]


def candidate_rewards(old_NK: Tensor, teacher_NK: Tensor, divergence: CandidatesPG) -> Tensor:
    """Detached advantage of each candidate (N, K), 0 on unused slots (where the teacher's log-prob is -inf)."""
    used_NK = teacher_NK > -torch.inf
    log_ratio_NK = torch.where(used_NK, teacher_NK - old_NK, 0.0)
    p_NK = torch.where(used_NK, old_NK.exp(), 0.0)
    if divergence.baseline:
        mass_N1 = p_NK.sum(-1, keepdim=True).clamp(min=1e-12)
        log_ratio_NK = (log_ratio_NK - (p_NK * log_ratio_NK).sum(-1, keepdim=True) / mass_N1) / mass_N1
    weight_NK = {"student": p_NK, "teacher": torch.where(used_NK, teacher_NK.exp(), 0.0), "none": used_NK.float()}
    return (weight_NK[divergence.weight] * log_ratio_NK).detach()


def candidate_loss(
    student_NK: Tensor, old_NK: Tensor, teacher_NK: Tensor, divergence: CandidatesPG, stabiliser: Stabiliser
) -> Tensor:
    """Sum over the candidates of their clipped surrogates (N,), with gradient to ``student_NK``."""
    reward_NK = candidate_rewards(old_NK, teacher_NK, divergence)
    surrogate = ppo_surrogate(reward_NK, student_NK, old_NK, stabiliser)
    trusted_NK = inside_trust_region(reward_NK, student_NK, old_NK, stabiliser.max_prob_drop)
    return torch.where(trusted_NK & (teacher_NK > -torch.inf), surrogate.loss_N, 0.0).sum(-1)


def candidate_table(topk: tuple[Ids, LogProbs], chosen: tuple[Ids, LogProbs], support: str) -> tuple[Ids, LogProbs]:
    """Ids of the support and the teacher's log-probs of them (N, K or 2K); -inf marks unused slots.

    ``topk`` are the teacher's ids with its log-probs, ``chosen`` the student's ids with the teacher's log-probs.
    """
    if support == "teacher":
        return topk
    if support == "student":
        return chosen
    both_NKK = chosen[0][:, :, None] == topk[0][:, None, :]
    shared_NK, known_NK = both_NKK.any(2), both_NKK.any(1)
    if support == "intersection":
        return chosen[0], np.where(shared_NK, chosen[1], -np.inf).astype(np.float32)
    only_student = np.where(shared_NK, -np.inf, chosen[1])
    teacher = topk[1] if support == "union" else np.where(known_NK, -np.inf, topk[1])
    logprobs = np.concatenate([teacher, only_student], 1).astype(np.float32)
    return np.concatenate([topk[0], chosen[0]], 1), logprobs
