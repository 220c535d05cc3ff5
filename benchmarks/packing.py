"""The learner's forward and backward pass over packed rows against padded ones.

Padded rows come eight at a time in the order they were drawn, as trainers collate them (``time_vs_padded``), or sorted
by length into buckets of the learner's own budget (``time_vs_buckets``). Packed rows have no padding and share the
beginnings they have in common; ``unshared_time_vs_padded`` and ``…_buckets`` are of rows as long, of tokens drawn
at random, that have no beginnings in common. The ``*_tokens`` are what the transformer is given.

``python -m benchmarks.packing [--prompts 30] [--pairs 5]``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentopd.build import build_policy
from agentopd.config.run import LearnerConfig, RolloutConfig
from agentopd.memory import keep_freed_memory
from agentopd.objective.microbatches import bucket_by_length
from agentopd.packing import Packed, pack
from benchmarks.harness import Ratio, compare, report
from benchmarks.inputs import episodes

COPIES, COLLATED = 2, 8
BUDGET = LearnerConfig().micro_batch_tokens


class Sides:
    """``rows`` through the transformer ``body``, packed and padded; ``drawn`` is their order as it comes."""

    def __init__(self, body: Any, rows: Sequence[Tensor], drawn: Sequence[int]) -> None:
        self._body, self._rows = body, rows
        self.collated = [drawn[i : i + COLLATED] for i in range(0, len(rows), COLLATED)]
        self.buckets = bucket_by_length([len(row) for row in rows], BUDGET)

    def padded(self, batches: Sequence[Sequence[int]]) -> None:
        """Forward and backward over padded batches."""
        for members in batches:
            ids_BT = self._together(members)
            mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([[len(self._rows[i])] for i in members])
            found = self._body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state
            found.sum().backward()

    def packed(self) -> None:
        """Forward and backward over packed buckets."""
        for members in self.buckets:
            laid = self._pack(members)
            ids, positions = laid.token_ids_M[None], laid.positions_M[None]
            found = self._body(input_ids=ids, position_ids=positions, use_cache=False, packed=laid).last_hidden_state
            found.sum().backward()

    def compare(self, name: str, pairs: int) -> tuple[Ratio, Ratio]:
        """How much faster packed rows are than collated ones, and than those in buckets."""
        return (
            compare(f"{name} vs padded", self.packed, lambda: self.padded(self.collated), pairs),
            compare(f"{name} vs buckets", self.packed, lambda: self.padded(self.buckets), pairs),
        )

    def num_padded(self, batches: Sequence[Sequence[int]]) -> int:
        """Tokens, padding included."""
        return sum(self._together(members).numel() for members in batches)

    def num_packed(self) -> int:
        """Tokens, what is shared counted once."""
        return sum(len(self._pack(members).token_ids_M) for members in self.buckets)

    def _together(self, members: Sequence[int]) -> Tensor:
        return pad_sequence([self._rows[i] for i in members], batch_first=True)

    def _pack(self, members: Sequence[int]) -> Packed:
        return pack(self._together(members), [len(self._rows[i]) for i in members])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    policy = build_policy("micro/student", "float32", RolloutConfig())
    rows = [torch.tensor(episode.token_ids) for episode in episodes(policy, options.prompts, COPIES)]
    drawn = torch.randperm(len(rows)).tolist()
    body = policy.model.base_model
    num_ids = policy.model.config.vocab_size
    sides = Sides(body, rows, drawn)
    unshared = Sides(body, [torch.randint(num_ids, (len(row),)) for row in rows], drawn)
    ratios = dict(zip(("speedup_vs_padded", "speedup_vs_buckets"), sides.compare("packed", options.pairs), strict=True))
    names = ("unshared_speedup_vs_padded", "unshared_speedup_vs_buckets")
    ratios |= zip(names, unshared.compare("packed, nothing shared,", options.pairs), strict=True)
    times = {name.replace("speedup", "time"): round(1 / found.median, 3) for name, found in ratios.items()}
    report(
        ratios,
        **times,
        tokens=sum(map(len, rows)),
        padded_tokens=sides.num_padded(sides.collated),
        bucket_tokens=sides.num_padded(sides.buckets),
        packed_tokens=sides.num_packed(),
        unshared_packed_tokens=unshared.num_packed(),
    )


if __name__ == "__main__":
    main()
