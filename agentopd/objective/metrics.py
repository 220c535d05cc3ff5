"""Metrics as sums and counts per skill, so that micro-batches and ranks reduce exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agentopd.objective.streams import Batch

Sums = dict[str, Tensor]
"""Name to (S, 2): the sum and the number of tokens of each skill."""


def token_sums(batch: Batch, streams: Mapping[str, tuple[Tensor, Tensor]]) -> Sums:
    """Sum each ``(value_N, taking_part_N)`` stream by skill; names never depend on the data, so ranks agree on them."""
    if not streams:
        return {}
    values_MN = torch.stack([torch.where(part, value.detach().float(), 0.0) for value, part in streams.values()])
    parts_MN = torch.stack([part.float() for _, part in streams.values()])
    values_MN, parts_MN = values_MN * batch.counted, parts_MN * batch.counted
    zeros_MS = values_MN.new_zeros(len(streams), len(batch.skills))
    sums_MS = zeros_MS.index_add(1, batch.skill_N, values_MN)
    counts_MS = zeros_MS.index_add(1, batch.skill_N, parts_MN)
    return dict(zip(streams, torch.stack([sums_MS, counts_MS], dim=-1), strict=True))


def add_sums(total: Sums, more: Mapping[str, Tensor]) -> Sums:
    """Element-wise sum of two sets of sums; a name in only one of them is kept."""
    return {
        name: total[name] + more[name] if name in total and name in more else x for name, x in {**total, **more}.items()
    }


def means(sums: Mapping[str, Tensor], skills: tuple[str, ...]) -> dict[str, float]:
    """``name`` over all tokens and ``skill/name`` for each skill that has any; names without a token are left out."""
    out: dict[str, float] = {}
    for name, table_S2 in sums.items():
        total, count = table_S2.sum(0).tolist()
        if count:
            out[name] = total / count
        for skill, (skill_total, skill_count) in zip(skills, table_S2.tolist(), strict=True):
            if skill_count:
                out[f"{skill}/{name}"] = skill_total / skill_count
    return out
