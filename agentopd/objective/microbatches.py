"""Length-sorted buckets under a token budget: how sequences share a forward pass, for the student and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from agentopd.objective.streams import PER_TOKEN, Batch


def bucket_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices so that rows x longest row stays within ``max_tokens``; a longer row gets a bucket of its own.

    Shortest first, ties in order, so the grouping is deterministic. Every index appears exactly once.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if buckets and (len(buckets[-1]) + 1) * lengths[index] <= max_tokens:
            buckets[-1].append(index)
        else:
            buckets.append([index])
    return buckets


def split_micro_batches(batch: Batch, max_tokens: int) -> list[Batch]:
    """Cut a batch into micro-batches of at most ``max_tokens`` padded tokens; a row is never split."""
    return [batch.select_rows(rows) for rows in bucket_by_length(batch.lengths_B.tolist(), max_tokens)]


def select_tokens(batch: Batch, start: int, stop: int) -> Batch:
    """The tokens from ``start`` to ``stop`` alone, on the same rows."""
    names = [f.name for f in fields(batch) if f.name.endswith(PER_TOKEN)]
    kept: dict[str, Any] = {name: getattr(batch, name)[start:stop] for name in names}
    return replace(batch, **kept)


def deal_rows(batch: Batch, parts: int) -> list[Batch]:
    """Deal a batch's rows into ``parts`` mini-batches, each with its share of every skill; some may be empty.

    Copies of one prompt lie side by side and so go to different mini-batches.
    """
    if parts == 1:
        return [batch]
    skill_B = torch.zeros(batch.num_rows, dtype=torch.int64)
    skill_B[batch.row_N] = batch.skill_N
    order = torch.argsort(skill_B, stable=True).tolist()
    return [batch.select_rows(sorted(order[part::parts])) for part in range(parts)]
