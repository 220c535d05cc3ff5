"""256 multi-turn episodes of mixed environments at once, acted by their gold scripts and judged.

Prints the throughput of the mixture over that of its slowest environment alone, interleaved pairs of wall time in one
run, and how much memory 10 000 episodes leave behind. ``--pairs`` and ``--episodes`` make it shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

import psutil

from agentopd.build import Judge, Skill, build_sandbox, load_skills
from agentopd.config.run import SandboxConfig, SkillConfig, SuiteConfig
from agentopd.rendering import HermesJSON
from agentopd.rollout import EpisodeSpec, run_scripted
from agentopd.types import Task
from benchmarks.harness import Ratio, report

LIVE = 256
NAMES = ("tool_use", "math_tools", "retail", "code_repair")
IN_PROCESS = ("tool_use", "math_tools", "retail")
TASKS = 32
"""Distinct tasks of each environment."""


async def play(judge: Judge, chosen: Sequence[tuple[Skill, Task]]) -> float:
    """Play and judge all at once; episodes a second of wall time. Every one of them must be solved."""
    codec = HermesJSON()

    async def one(index: int, skill: Skill, task: Task) -> bool:
        spec = EpisodeSpec(task, skill.env, id=str(index), skill=skill.name)
        episode = await run_scripted(spec, skill.env.gold_turns(task), codec)  # type: ignore[attr-defined]
        return (await judge(task, episode)).passed

    started = time.perf_counter()
    solved = await asyncio.gather(*(one(index, *item) for index, item in enumerate(chosen)))
    assert all(solved), "a gold trajectory was not judged right"
    return len(chosen) / (time.perf_counter() - started)


def mixture(tasks: dict[str, list[tuple[Skill, Task]]], names: Sequence[str]) -> list[tuple[Skill, Task]]:
    """Episodes of the named environments in turn."""
    streams = {name: cycle(tasks[name]) for name in names}
    return [next(streams[name]) for name in islice(cycle(names), LIVE)]


async def measure(pairs: int, episodes: int) -> None:
    """Throughput, then memory."""
    skills = load_skills(SuiteConfig(skills=tuple(SkillConfig(name=name, env=name) for name in NAMES)))
    tasks = {name: [(skill, task) for task in skill.tasks("train", TASKS, 0)] for name, skill in skills.items()}
    judge = Judge(skills.values(), build_sandbox(SandboxConfig(), skills.values()))
    try:
        await judge.sandbox.start()
        ratios = []
        for _ in range(pairs + 1):  # The first warms up.
            alone = [await play(judge, mixture(tasks, [name])) for name in NAMES]
            ratios.append(await play(judge, mixture(tasks, NAMES)) / min(alone))
        grown = await memory(judge, tasks, episodes)
    finally:
        await judge.sandbox.aclose()
    kept = ratios[1:]
    ratio = Ratio("mixture vs its slowest environment", median(kept), min(kept), max(kept), pairs)
    report({"vs_slowest": ratio}, grown_mb=round(grown, 1), episodes=episodes)


async def memory(judge: Judge, tasks: dict[str, list[tuple[Skill, Task]]], episodes: int) -> float:
    """Resident MiB that the last nine tenths of the episodes added; environments of this process only."""
    process, before = psutil.Process(), 0
    for done in range(0, episodes, LIVE):
        if not before and done >= episodes // 10:
            gc.collect()
            before = process.memory_info().rss
        await play(judge, mixture(tasks, IN_PROCESS))
    gc.collect()
    return (process.memory_info().rss - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=10_000)
    given = parser.parse_args()
    asyncio.run(measure(given.pairs, given.episodes))


if __name__ == "__main__":
    main()
