"""How cost grows: CPU seconds against size, and the exponent of the power that fits best.

``tasks``: the tensor record and the metrics of a step, by the number of prompts in it. ``turns``: an episode in the
in-process engine, by its number of turns of equal length; attention reads all turns before, so this is not linear work.
``positions``: the fused head's loss and gradients, by the number of trained tokens, beyond one chunk of logits.
``length``: the learner's forward and backward pass over as many tokens in longer rows. ``workers``: the CPU time of as
many programs in the jail, by how many run at once. An exponent of 1 is linear work; of ``length`` and ``workers``,
whose work is the same throughout, 0.

``python -m benchmarks.growth [--scale 1.0]``
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from agentopd.batching import build_batch
from agentopd.build import Policy, build_policy
from agentopd.config.load import resolve_objective
from agentopd.config.run import RolloutConfig
from agentopd.contracts import Case, GenerationRequest, Program, SamplingParams, ScoredEpisode
from agentopd.engines import HFEngine
from agentopd.memory import keep_freed_memory
from agentopd.packing import pack
from agentopd.stats import step_metrics
from agentopd.types import Verdict, VerdictStatus
from agentopd_sandboxes.jail import JailSandbox
from benchmarks.harness import cpu_seconds, report
from benchmarks.inputs import episodes
from benchmarks.loss_head import Case as HeadCase

REPEATS = 3
VERDICT = Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)


def exponent(sizes: Sequence[int], cost: Callable[[int], float]) -> float:
    """Slope of log cost over log size, each size at its cheapest of a few runs, in turn."""
    cost(sizes[0])
    found = [[cost(size) for size in sizes] for _ in range(REPEATS)]
    slope, _ = np.polyfit(np.log(sizes), np.log(np.min(found, axis=0)), 1)
    return round(float(slope), 3)


def tasks(policy: Policy, sizes: Sequence[int]) -> float:
    scored = [ScoredEpisode(episode, VERDICT) for episode in episodes(policy, max(sizes), 2)]
    objective, classify = resolve_objective("grpo"), policy.classify()

    def cost(size: int) -> float:
        some = scored[: 2 * size]

        def step() -> None:
            build_batch(some, objective, {"store": 1.0}, classify, policy.pad_id)
            step_metrics([(item.episode, item.verdict) for item in some])

        return cpu_seconds(step)

    return exponent(sizes, cost)


def turns(policy: Policy, sizes: Sequence[int]) -> float:
    """32 new tokens a turn, the last of them sampled: any ends the turn. Eight episodes at once, none like another."""
    engine, params = HFEngine(policy.model), SamplingParams(max_tokens=2, stop_ids=tuple(range(len(policy.tokenizer))))

    def play(size: int) -> None:
        rows = [list(range(3 + row, 34 + row)) for row in range(8)]
        for turn in range(size):
            made = engine.generate_now(
                [GenerationRequest(tuple(row), params, turn, f"{index}") for index, row in enumerate(rows)]
            )
            for row, answer in zip(rows, made, strict=True):
                row += [*answer.token_ids, *range(3, 34)]
        engine.turns.clear()

    return exponent(sizes, lambda size: cpu_seconds(lambda: play(size)))


def positions(sizes: Sequence[int]) -> float:
    cases = {size: HeadCase(size, 64, 8192, torch.float32) for size in sizes}
    return exponent(sizes, lambda size: cpu_seconds(cases[size].fused))


def length(policy: Policy, sizes: Sequence[int], tokens: int) -> float:
    body = policy.model.base_model

    def cost(size: int) -> float:
        ids_BT = torch.randint(3, 500, (tokens // size, size), generator=torch.Generator().manual_seed(0))
        laid = pack(ids_BT, [size] * len(ids_BT))

        def step() -> None:
            ids, where = laid.token_ids_M[None], laid.positions_M[None]
            body(input_ids=ids, position_ids=where, use_cache=False, packed=laid).last_hidden_state.sum().backward()

        return cpu_seconds(step)

    return exponent(sizes, cost)


async def workers(sizes: Sequence[int], programs: int) -> float:
    """CPU seconds of the jail's processes are theirs: what is taken is the whole process tree's, once they ended."""

    async def judged(size: int) -> float:
        started = os.times()
        sandbox = JailSandbox(size)
        await sandbox.start()
        cases = [Case(str(n), "sum(range(args[0]))", args=(20_000,)) for n in range(4)]
        await asyncio.gather(*(sandbox.run_cases(Program(f"# {n}\n"), cases) for n in range(programs)))
        await sandbox.aclose()
        ended = os.times()
        return sum(ended[:4]) - sum(started[:4])

    found = [[await judged(size) for size in sizes] for _ in range(REPEATS)]
    slope, _ = np.polyfit(np.log(sizes), np.log(np.min(found, axis=0)), 1)
    return round(float(slope), 3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="Sizes are multiplied by this.")
    scale = parser.parse_args(arguments).scale
    keep_freed_memory()
    policy = build_policy("micro/student", "float32", RolloutConfig())

    def scaled(*sizes: int) -> list[int]:
        return [max(1 + index, round(scale * size)) for index, size in enumerate(sizes)]

    figures = {
        "tasks": tasks(policy, scaled(16, 64, 256)),
        "turns": turns(policy, scaled(2, 4, 8, 12)),
        "positions": positions(scaled(2048, 4096, 8192)),
        "length": length(policy, (64, 128, 256, 512), max(512, round(scale * 4096))),
        "workers": asyncio.run(workers((1, 2, 4), max(2, round(scale * 24)))),
    }
    for name, found in figures.items():
        print(f"{name:<12} {found:5.2f}")
    report({}, **{f"exponent_{name}": found for name, found in figures.items()})


if __name__ == "__main__":
    main()
