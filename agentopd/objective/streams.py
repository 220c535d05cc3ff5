"""The one tensor record of the project, and what the student adds to it.

Only the N sampled tokens are kept, flattened in row order: prompt, tool results and padding never reach the output
head. B episodes, T padded length, N sampled tokens, K teacher top-K or candidates, G a teacher's hidden width.

Every loss component is a plain weighted sum over tokens. The weights are the ``*_scale_N`` streams: a token's share of
its skill, divided by the *global* number of tokens of that skill taking part in that component. So micro-batches,
gradient accumulation and data-parallel ranks only ever add up; none of them rescales another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

PER_TOKEN = ("_N", "_NK", "_NG")  # how the names of streams end that have one entry per sampled token


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
    source_B: Tensor  # which of the scored episodes each row is
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
    teacher_N: Tensor  # index into ``teachers`` of the token's teacher
    teacher_hidden_NG: Tensor
    """A local teacher's hidden states where whole distributions are compared; else G is 0."""
    ref_logprobs_N: Tensor
    overlap_N: Tensor
    """Share of the student's candidates among the teacher's top-K; 0 where candidates are not asked for."""
    advantage_N: Tensor
    """The verifier's advantage of the token's episode; 0 where it is unknown."""
    sigma_N: Tensor
    """Verdict's sign in [-1, 1]: 2s-1 of the episode, a step certificate's sign where there is one, 0 if unknown."""
    segment_N: Tensor
    """The token's segment in its row where the teacher has another tokenizer; -1 outside all."""
    teacher_rest_N: Tensor  # the teacher's joint log-prob of its tokens of that segment after the first
    policy_N: Tensor  # False on trajectories that take part in the anchor alone
    special_N: Tensor  # role and end-of-turn markers
    span_N: Tensor  # inside a tool call
    teacher_scale_N: Tensor
    verifier_scale_N: Tensor
    anchor_scale_N: Tensor
    reference_scale_N: Tensor
    teachers: tuple[str, ...] = ()  # names that ``teacher_N`` indexes: the teachers of this rank's rows
    quarantined: Mapping[int, str] = field(default_factory=dict)  # scored episodes that cannot train, and why
    counted: bool = True  # False for a filler whose tokens are in no metric
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Counters of the whole batch, summed over ranks; empty on micro-batches."""

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
            f.name: getattr(self, f.name)[kept] for f in fields(self) if f.name.endswith(PER_TOKEN)
        }
        return replace(
            self,
            **{
                **per_token,
                "row_N": new_row_N[kept],
                "input_ids_BT": self.input_ids_BT[rows, :width],
                "lengths_B": lengths_B,
                "truncated_B": self.truncated_B[rows],
                "source_B": self.source_B[rows],
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
    old_topk_logprobs_NK: Tensor | None = None
    """The same at ``teacher_topk_ids_NK``."""
    divergence_N: Tensor | None = None
    """Divergence over whole distributions, with gradient; None where the objective reads none."""
    entropy_N: Tensor | None = None
    """The student's entropy in nats, without gradient; None where the objective reads none."""
    phi_mean: Tensor | None = None
    """Mean of phi over the whole batch (scalar); None takes this micro-batch's own."""
    progress: float = 0.0
    """Share of the run's steps that are done, in [0, 1)."""

    @property
    def old_N(self) -> Tensor:
        """Log-probs before the update, without gradient."""
        return self.logprobs_N.detach() if self.old_logprobs_N is None else self.old_logprobs_N

    @property
    def old_topk_NK(self) -> Tensor:
        """Log-probs at ``teacher_topk_ids_NK`` before the update, without gradient."""
        return self.topk_logprobs_NK.detach() if self.old_topk_logprobs_NK is None else self.old_topk_logprobs_NK
