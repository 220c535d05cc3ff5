"""The output head where an objective reads whole distributions: divergence to a local teacher, and entropy.

As in ``head``, positions go through in chunks that are recomputed in the backward pass, so one (chunk, V) block of each
side is alive at a time; the teacher's side is its hidden states, and its logits exist only inside a chunk. Shapes: N
positions, H and G hidden widths of student and teacher, K ids per position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentopd.config.objective import Blocks
from agentopd.config.objective_blocks import NoDivergence
from agentopd.config.objective_data import GOLD
from agentopd.errors import ConfigError
from agentopd.learner.head import Head, chunk_size, head_logprobs, logits_of
from agentopd.objective.divergences import full_divergence, kernel
from agentopd.objective.gold import gold_divergence, rest_logprobs
from agentopd.objective.streams import Batch


class WideStreams(NamedTuple):
    """Log-probs at the target (N,) and at the top-K ids (N, K), divergence and entropy (N,); 0 where not asked for."""

    logprobs_N: Tensor
    topk_NK: Tensor
    divergence_N: Tensor
    entropy_N: Tensor


def wide_logprobs(
    hidden_NH: Tensor,
    head: Head,
    batch: Batch,
    objective: Blocks,
    teacher_heads: Mapping[str, Head],
    chunk: int | None = None,
) -> WideStreams:
    """Everything the objective reads of the student at the batch's positions, in fp32.

    Gradient flows to the student's side of all but the entropy. Raises ``ConfigError`` if a teacher's head is missing.
    """
    heads = [teacher_heads.get(name) for name in batch.teachers]
    ids = torch.cat([batch.target_N[:, None], batch.teacher_topk_ids_NK], dim=1)
    rest_N2 = _rest(hidden_NH, head, batch, objective)
    streams = (hidden_NH, ids, batch.teacher_hidden_NG, batch.teacher_N, batch.supervised_N, rest_N2)

    def one_chunk(
        hidden: Tensor, ids: Tensor, teacher: Tensor, index: Tensor, part: Tensor, rest: Tensor
    ) -> tuple[Tensor, ...]:
        logits = logits_of(hidden, head)
        found = logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
        apart = hidden.new_zeros(len(hidden), dtype=torch.float32)
        if objective.needs_full_vocabulary:
            for number, (name, teacher_head) in enumerate(zip(batch.teachers, heads, strict=True)):
                members = (part & (index == number)).nonzero().squeeze(1)
                if len(members):
                    found_there = _compared(logits[members], teacher[members], rest[members], name, teacher_head)
                    apart = apart.index_put((members,), found_there)
        return (
            found[:, 0],
            found[:, 1:],
            apart,
            _entropy(logits) if objective.needs_entropy else torch.zeros_like(apart),
        )

    def _compared(logits: Tensor, hidden: Tensor, rest: Tensor, name: str, teacher_head: Head | None) -> Tensor:
        if teacher_head is None:
            raise ConfigError(f"teacher {name!r} is not in this process: whole distributions cannot be compared")
        assert not isinstance(objective.divergence, NoDivergence)
        width = teacher_head.weight.shape[1]
        with torch.no_grad():
            other = logits_of(hidden[:, :width].to(teacher_head.weight.dtype), teacher_head)
        if not isinstance(objective.alignment, GOLD):
            return full_divergence(logits, other, objective.divergence)
        ours, theirs = logits.log_softmax(-1) + rest[:, :1], other.log_softmax(-1) + rest[:, 1:]
        weight = objective.alignment.matched_weight
        return gold_divergence(ours, theirs, teacher_head.student_ids, kernel(objective.divergence), weight)

    size = chunk or chunk_size(head)
    if len(ids) <= size:
        return WideStreams(*one_chunk(*streams))
    cuts = zip(*(torch.split(stream, size) for stream in streams), strict=True)
    parts = [checkpoint(one_chunk, *cut, use_reentrant=False) for cut in cuts]
    return WideStreams(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _rest(hidden_NH: Tensor, head: Head, batch: Batch, objective: Blocks) -> Tensor:
    """Joint log-probs of what follows in the token's segment, the student's and the teacher's (N, 2); 0 if unread."""
    if not isinstance(objective.alignment, GOLD):
        return hidden_NH.new_zeros(len(hidden_NH), 2, dtype=torch.float32)
    own_N, _ = head_logprobs(hidden_NH, head, batch.target_N, batch.teacher_topk_ids_NK[:, :0])
    return torch.stack([rest_logprobs(own_N, batch.row_N, batch.segment_N), batch.teacher_rest_N], dim=1)


@torch.no_grad()
def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
