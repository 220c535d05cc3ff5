"""The one tensor record of the project, and what the student adds to it.

Only the N sampled tokens are kept, flattened in row order: prompt, tool results and padding never reach the output
head. B episodes, T padded length, N sampled tokens, K teacher top-K.

Every loss component is a plain weighted sum over tokens. The weights are the ``*_scale_N`` streams: a token's share of
its skill, divided by the *global* number of tokens of that skill taking part in that component. So micro-batches,
gradient accumulation and data-parallel ranks only ever add up; none of them rescales another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks and returns the sum."""


def single_process(tensor: Tensor) -> Tensor:
    """The all-reduce of one process: the identity."""
    return tensor


@dataclass(frozen=True)
class Batch:
    """One batch (or micro-batch). Integer streams are int64, flags bool, the rest fp32 and finite.

    The exceptions to finite are the unused slots of ``teacher_topk_logprobs_NK``, which are -inf.
    """

    skills: tuple[str, ...]
    """Names that ``skill_N`` indexes; the same on every rank."""
    input_ids_BT: Tensor
    """Right-padded token ids, cut after each row's last sampled token."""
    lengths_B: Tensor
    truncated_B: Tensor
    row_N: Tensor
    position_N: Tensor
    """Index of the token in its row, at least 1: its logits are those at ``position - 1``."""
    target_N: Tensor
    turn_N: Tensor
    skill_N: Tensor
    rollout_logprobs_N: Tensor
    teacher_logprobs_N: Tensor
    teacher_topk_ids_NK: Tensor
    teacher_topk_logprobs_NK: Tensor
    ref_logprobs_N: Tensor
    advantage_N: Tensor
    """Group-relative advantage of the token's episode; 0 where it is unknown."""
    sigma_N: Tensor
    """Verdict's sign in [-1, 1]: 2s-1 of the episode, a step certificate's sign where there is one, 0 if unknown."""
    special_N: Tensor
    """Role and end-of-turn markers."""
    span_N: Tensor
    """Inside a tool-call span."""
    teacher_scale_N: Tensor
    verifier_scale_N: Tensor
    anchor_scale_N: Tensor
    reference_scale_N: Tensor
    counted: bool = True
    """False for a filler whose tokens are in no metric."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counters of the whole batch, already summed over ranks; empty on micro-batches."""

    @property
    def num_rows(self) -> int:
        """B."""
        return self.input_ids_BT.shape[0]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.row_N.shape[0]

    @property
    def supervised_N(self) -> Tensor:
        """Tokens the teacher term takes part in."""
        return self.teacher_scale_N > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same record on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def select_rows(self, rows: list[int]) -> Batch:
        """The micro-batch of ``rows``, in that order, without padding it does not need."""
        rank_B = torch.full((self.num_rows,), -1, dtype=torch.int64)
        rank_B[rows] = torch.arange(len(rows))
        new_row_N = rank_B.to(self.row_N.device)[self.row_N]
        kept = (new_row_N >= 0).nonzero().squeeze(1)
        kept = kept[torch.argsort(new_row_N[kept], stable=True)]
        lengths_B = self.lengths_B[rows]
        width = int(lengths_B.max()) if rows else 0
        per_token: dict[str, Any] = {
            f.name: getattr(self, f.name)[kept] for f in fields(self) if f.name.endswith(("_N", "_NK"))
        }
        return replace(
            self,
            **{
                **per_token,
                "row_N": new_row_N[kept],
                "input_ids_BT": self.input_ids_BT[rows, :width],
                "lengths_B": lengths_B,
                "truncated_B": self.truncated_B[rows],
                "metrics": {},
            },
        )


@dataclass(frozen=True)
class Streams:
    """What the loss reads: the batch, and the student's log-probs on it at temperature 1."""

    batch: Batch
    logprobs_N: Tensor
    """Current log-prob of each sampled token, with gradient."""
    topk_logprobs_NK: Tensor
    """Current full-vocabulary log-probs at ``teacher_topk_ids_NK``, with gradient."""
    old_logprobs_N: Tensor | None = None
    """Log-probs before the update; None means this is the only pass, so they equal the current ones."""

    @property
    def old_N(self) -> Tensor:
        """Log-probs before the update, without gradient."""
        return self.logprobs_N.detach() if self.old_logprobs_N is None else self.old_logprobs_N
