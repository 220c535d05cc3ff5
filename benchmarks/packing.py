"""The learner's forward and backward pass over packed rows against padded ones.

Padded rows come eight at a time in the order they were drawn, as trainers collate them (``time_vs_padded``), or sorted
by length into buckets of the learner's own budget (``time_vs_buckets``). Packed rows have no padding and share the
beginnings they have in common; the ``*_tokens`` are what the transformer is given.

``python -m benchmarks.packing [--prompts 30] [--pairs 5]``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentopd.build import build_policy
from agentopd.config.run import LearnerConfig, RolloutConfig
from agentopd.memory import keep_freed_memory
from agentopd.objective.microbatches import bucket_by_length
from agentopd.packing import pack
from benchmarks.harness import compare, report
from benchmarks.inputs import episodes

COPIES, COLLATED = 2, 8
BUDGET = LearnerConfig().micro_batch_tokens


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    policy = build_policy("micro/student", "float32", RolloutConfig())
    rows = [torch.tensor(episode.token_ids) for episode in episodes(policy, options.prompts, COPIES)]
    shuffled = torch.randperm(len(rows)).tolist()
    drawn = [shuffled[i : i + COLLATED] for i in range(0, len(rows), COLLATED)]
    sorted_rows = bucket_by_length([len(row) for row in rows], BUDGET)
    body = policy.model.base_model

    def together(members: Sequence[int]) -> Tensor:
        return pad_sequence([rows[i] for i in members], batch_first=True)

    def padded(batches: Sequence[Sequence[int]]) -> None:
        for members in batches:
            ids_BT = together(members)
            mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([[len(rows[i])] for i in members])
            found = body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state
            found.sum().backward()

    def packed() -> None:
        for members in sorted_rows:
            laid = pack(together(members), [len(rows[i]) for i in members])
            ids, positions = laid.token_ids_M[None], laid.positions_M[None]
            body(input_ids=ids, position_ids=positions, use_cache=False, packed=laid).last_hidden_state.sum().backward()

    ratios = {
        "speedup_vs_padded": compare("packed vs padded", packed, lambda: padded(drawn), options.pairs),
        "speedup_vs_buckets": compare("packed vs buckets", packed, lambda: padded(sorted_rows), options.pairs),
    }
    report(
        ratios,
        time_vs_padded=round(1 / ratios["speedup_vs_padded"].median, 3),
        time_vs_buckets=round(1 / ratios["speedup_vs_buckets"].median, 3),
        tokens=sum(map(len, rows)),
        padded_tokens=sum(together(members).numel() for members in drawn),
        bucket_tokens=sum(together(members).numel() for members in sorted_rows),
        packed_tokens=sum(
            len(pack(together(members), [len(rows[i]) for i in members]).token_ids_M) for members in sorted_rows
        ),
    )


if __name__ == "__main__":
    main()
