"""Shared by all benchmarks: interleaved A/B timing in CPU seconds, ratios with spread, one JSON line at the end."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How much faster ``ours`` is than ``theirs``, pair by pair (above 1 is faster)."""

    name: str
    median: float
    low: float
    high: float
    pairs: int

    def line(self) -> str:
        """One row for a person."""
        return f"{self.name:<40} {self.median:6.2f}x  ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def cpu_seconds(work: Callable[[], object]) -> float:
    """Process CPU time of one call, all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 5) -> Ratio:
    """Run both in turn, after one warm-up each; the ratio of each pair survives a machine whose speed drifts."""
    ours(), theirs()
    ratios = []
    for _ in range(pairs):
        mine = cpu_seconds(ours)
        ratios.append(cpu_seconds(theirs) / mine)
    return Ratio(name, statistics.median(ratios), min(ratios), max(ratios), pairs)


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every way, each once a round: for work too long to be repeated for every pair."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(cpu_seconds(work))
    return found


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Theirs over ours, round by round."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Ratio(name, statistics.median(found), min(found), max(found), len(found))


def peak_kb(work: Callable[..., object], *arguments: object) -> int:
    """Peak memory of a fresh process, in which everything is imported, that does ``work`` once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agentopd.learner.deepspeed"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return pool.submit(_peak_of, work, arguments).result()


def _peak_of(work: Callable[..., object], arguments: tuple[object, ...]) -> int:
    work(*arguments)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(ratios: dict[str, Ratio], **figures: float) -> None:
    """Rows, then one JSON object on the last line: medians by their keys, the spread beside them."""
    for ratio in ratios.values():
        print(ratio.line())
    medians = {key: round(ratio.median, 3) for key, ratio in ratios.items()}
    lows = {f"{key}_low": round(ratio.low, 3) for key, ratio in ratios.items()}
    highs = {f"{key}_high": round(ratio.high, 3) for key, ratio in ratios.items()}
    print(json.dumps({**medians, **lows, **highs, **figures}))
