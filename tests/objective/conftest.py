"""Random token streams on a small vocabulary, with the student's logits as the only leaf."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from agentopd.config.objective import ObjectiveConfig
from agentopd.config.presets import PRESETS
from agentopd.objective.compose import LossOutput, compute_loss
from agentopd.objective.divergences import full_divergence
from agentopd.objective.streams import Batch, Streams

OFF = {"cap": None, "sequence_budget": None, "max_prob_drop": None, "tis_cap": None}


@dataclass
class Sample:
    """Streams whose log-probs come from ``logits_NV``; ``teacher_NV`` are the teacher's log-probs."""

    streams: Streams
    logits_NV: torch.Tensor
    teacher_NV: torch.Tensor

    def seen(self, objective: ObjectiveConfig) -> Streams:
        """The streams with what the learner adds for this objective."""
        if not objective.needs_full_vocabulary:
            return self.streams
        return replace(
            self.streams, divergence_N=full_divergence(self.logits_NV, self.teacher_NV, objective.divergence)
        )

    def loss(self, objective: ObjectiveConfig) -> LossOutput:
        return compute_loss(self.seen(objective), objective)

    def grad(self, objective: ObjectiveConfig) -> torch.Tensor:
        self.logits_NV.grad = None
        self.loss(objective).loss.backward(retain_graph=True)
        assert self.logits_NV.grad is not None
        return self.logits_NV.grad.clone()


def _sample(
    seed: int = 0,
    sizes: tuple[int, ...] = (4, 3, 5),
    vocab: int = 9,
    k: int = 4,
    teacher_logits_NV: torch.Tensor | None = None,
    student_logits_NV: torch.Tensor | None = None,
    off_policy: float = 0.0,
    **fields: Any,
) -> Sample:
    """One skill, equal weights: every scale is 1/N. ``fields`` override the batch's."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    row_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    offset_N = torch.cat([torch.arange(size) for size in sizes])
    logits_NV = 2 * torch.randn(n, vocab, generator=g) if student_logits_NV is None else student_logits_NV.clone()
    teacher_NV = 2 * torch.randn(n, vocab, generator=g) if teacher_logits_NV is None else teacher_logits_NV
    target_N = fields.pop("target_N", torch.randint(vocab, (n,), generator=g))
    logits_NV.requires_grad_()
    student_NV, teacher_NV = logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    topk = teacher_NV.topk(k)
    logprobs_N = student_NV.gather(1, target_N[:, None])[:, 0]
    old_N = logprobs_N.detach() + off_policy * torch.randn(n, generator=g)
    zeros_N, scale_N = torch.zeros(n), torch.full((n,), 1 / n)
    defaults: dict[str, Any] = {
        "skills": ("a",),
        "input_ids_BT": torch.zeros(len(sizes), max(sizes) + 1, dtype=torch.int64),
        "lengths_B": torch.tensor(sizes) + 1,
        "truncated_B": torch.zeros(len(sizes), dtype=torch.bool),
        "source_B": torch.arange(len(sizes)),
        "row_N": row_N,
        "position_N": offset_N + 1,
        "turn_N": offset_N // 2,
        "skill_N": torch.zeros(n, dtype=torch.int64),
        "rollout_logprobs_N": old_N + 0.1 * off_policy * torch.randn(n, generator=g),
        "teacher_logprobs_N": teacher_NV.gather(1, target_N[:, None])[:, 0],
        "teacher_topk_ids_NK": topk.indices,
        "teacher_topk_logprobs_NK": topk.values,
        "teacher_N": torch.zeros(n, dtype=torch.int64),
        "teacher_hidden_NG": torch.zeros(n, 0),
        "overlap_N": zeros_N,
        "segment_N": offset_N,
        "teacher_rest_N": zeros_N,
        "policy_N": torch.ones(n, dtype=torch.bool),
        "ref_logprobs_N": logprobs_N.detach() + 0.3 * torch.randn(n, generator=g),
        "advantage_N": torch.randn(len(sizes), generator=g)[row_N],
        "sigma_N": torch.tensor([1.0, -1.0, 0.0] * len(sizes))[row_N],
        "special_N": zeros_N.bool(),
        "span_N": offset_N % 2 == 0,
        "teacher_scale_N": scale_N,
        "verifier_scale_N": scale_N,
        "anchor_scale_N": scale_N,
        "reference_scale_N": scale_N,
    }
    batch = Batch(target_N=target_N, **{**defaults, **fields})
    topk_logprobs_NK = student_NV.gather(1, batch.teacher_topk_ids_NK)
    old = old_N if off_policy else None
    entropy_N = -(student_NV.exp() * student_NV).sum(-1).detach()
    return Sample(Streams(batch, logprobs_N, topk_logprobs_NK, old, entropy_N=entropy_N), logits_NV, teacher_NV)


def _preset(name: str, **blocks: Any) -> ObjectiveConfig:
    """A preset with some settings of its blocks replaced."""
    merged: dict[str, Any] = {**PRESETS[name], "preset": name}
    for block, settings in blocks.items():
        base = merged.get(block, {})
        keep = isinstance(base, dict) and settings.get("kind", base.get("kind")) == base.get("kind")
        merged[block] = {**base, **settings} if keep else settings
    return ObjectiveConfig.model_validate(merged)


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sample]:
    return _sample


@pytest.fixture(scope="session")
def preset() -> Callable[..., ObjectiveConfig]:
    return _preset


@pytest.fixture(scope="session")
def off() -> dict[str, Any]:
    return OFF
