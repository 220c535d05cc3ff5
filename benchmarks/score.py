"""A local teacher's evidence with its top 64 against a plain forward pass of transformers on the same rows.

The plain pass is in length-sorted buckets of the teacher's own budget, right-padded, and keeps no log-prob: it stops at
the logits of every position. ``*_vs_forward`` is its time over ours.

``python -m benchmarks.score [--prompts 16] [--pairs 5]``
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from agentopd.build import build_policy
from agentopd.config.run import RolloutConfig
from agentopd.memory import keep_freed_memory
from agentopd.objective.microbatches import bucket_by_length
from agentopd.teachers.local import LocalTeacher
from benchmarks.harness import compare, report
from benchmarks.inputs import episodes

COPIES, BUDGET, TOP_K = 4, 16384, 64


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    policy = build_policy("micro/teacher", "float32", RolloutConfig())
    several, alone = episodes(policy, options.prompts, COPIES), episodes(policy, options.prompts, 1)
    teacher = LocalTeacher("teacher", policy.model, BUDGET)

    def forward(some: Sequence[torch.Tensor]) -> Callable[[], None]:
        buckets = [[some[i] for i in members] for members in bucket_by_length([len(x) for x in some], BUDGET)]

        def run() -> None:
            with torch.no_grad():
                for rows in buckets:
                    policy.model(input_ids=pad_sequence(rows, batch_first=True), use_cache=False)

        return run

    def against(name: str, chosen: list, top_k: int):  # type: ignore[no-untyped-def, type-arg]
        rows = [torch.tensor(episode.token_ids) for episode in chosen]
        return compare(name, lambda: asyncio.run(teacher.score(chosen, top_k)), forward(rows), options.pairs)

    report(
        {
            "vs_forward": against("top 64, groups of 4, vs forward", several, TOP_K),
            "alone_vs_forward": against("top 64, prompts alone, vs forward", alone, TOP_K),
            "sampled_vs_forward": against("sampled tokens, groups of 4, vs forward", several, 0),
        },
        tokens=sum(len(episode.token_ids) for episode in several),
        top_k=TOP_K,
    )


if __name__ == "__main__":
    main()
