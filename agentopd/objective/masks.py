"""Which sampled tokens the teacher term leaves out.

Role and end-of-turn markers carry the chat format, not the skill: a teacher's opinion on them is style. They are
recognised by id on every turn, and the verifier's term keeps them. A truncated episode may also hide its last tenth,
and an episode may keep only the tokens on which the student was least certain (Revisiting OPD, arXiv 2603.25562).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_SHARE = 0.1
"""Share of a truncated episode's sampled tokens, at its end, that ``mask_tail`` hides."""


@dataclass(frozen=True)
class TokenClasses:
    """Per token of one turn: is it a role or end-of-turn marker, is it inside a tool call, does a sentence end there.

    ``ends_segment`` may be empty: the turn is then one segment.
    """

    special: tuple[bool, ...]
    in_span: tuple[bool, ...]
    ends_segment: tuple[bool, ...] = ()


ClassifyTokens = Callable[[Sequence[int]], TokenClasses]
"""Classes of the ids of one turn."""


def hidden_tail(num_sampled: int) -> int:
    """Number of tokens ``mask_tail`` hides at the end of a truncated episode of ``num_sampled`` tokens."""
    return math.ceil(TAIL_SHARE * num_sampled)


def num_kept(num_tokens: int, ratio: float | None) -> int:
    """Number of tokens of an episode that the entropy mask keeps."""
    return num_tokens if ratio is None else math.ceil(ratio * num_tokens)


def most_uncertain(entropy_N: Tensor, row_N: Tensor, taking_part_N: Tensor, ratio: float | None) -> Tensor:
    """The tokens taking part that are among the ``ratio`` of highest entropy in their episode (N,), earlier ones first.

    Every episode keeps exactly ``num_kept`` of its tokens taking part.
    """
    if ratio is None:
        return taking_part_N
    part = taking_part_N.nonzero().squeeze(1)
    order = torch.argsort(entropy_N[part].detach(), descending=True, stable=True)
    order = order[torch.argsort(row_N[part][order], stable=True)]
    counts_B = torch.bincount(row_N[part], minlength=1)
    start_B = counts_B.cumsum(0) - counts_B
    row = row_N[part][order]
    rank = torch.arange(len(part), device=part.device) - start_B[row]
    kept_B = torch.tensor([num_kept(int(n), ratio) for n in counts_B.tolist()], device=part.device)
    kept_N = torch.zeros_like(taking_part_N)
    kept_N[part[order]] = rank < kept_B[row]
    return kept_N
