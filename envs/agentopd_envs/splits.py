"""Endless tasks in splits that never overlap.

Which split a problem belongs to is a property of the problem, not of the draw: a stable hash of its *core* (the numbers
and the structure, not the names in it) picks one of 20 buckets; 0-1 are eval, 2-3 retention, the rest train. So no seed
and no index can put one problem into two splits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import count
from typing import TypeVar

from agentopd.errors import TaskError
from agentopd.types import Split

P = TypeVar("P")

_BUCKETS = 20
_SPLITS: tuple[Split, ...] = ("eval", "eval", "retention", "retention")
_MAX_DRAWS = 10_000


def split_of(core: object) -> Split:
    """The split of a problem. ``core`` is plain data (its ``repr`` must be stable across processes)."""
    bucket = int.from_bytes(blake2b(repr(core).encode(), digest_size=8).digest(), "big") % _BUCKETS
    return _SPLITS[bucket] if bucket < len(_SPLITS) else "train"


def procedural(
    draw: Callable[[random.Random], P],
    core: Callable[[P], object],
    split: Split,
    limit: int | None,
    seed: int,
    name: str,
) -> Iterator[tuple[str, P]]:
    """Yield (task id, problem) pairs of one split: ``limit`` of them, or without end when it is None.

    Each pair depends only on (name, seed, split, index). Raises ``TaskError`` where ``draw`` has too few distinct
    problems to put any into the split.
    """
    for index in count() if limit is None else range(limit):
        task_id = f"{name}/{split}/{seed}/{index}"
        rng = random.Random(task_id)
        for _ in range(_MAX_DRAWS):
            problem = draw(rng)
            if split_of(core(problem)) == split:
                break
        else:
            raise TaskError(
                f"{name}: none of {_MAX_DRAWS} generated problems fell into split {split!r}; "
                "its generator needs more distinct problems"
            )
        yield task_id, problem
