"""256 multi-turn episodes of mixed environments at once, acted by their gold scripts and judged.

Three ratios of throughput, each from rounds in which both sides run one after the other in the same process:

- ``vs_slowest``: the mixture over its slowest environment alone, 256 episodes each;
- ``vs_apart``: the mixture over the same 256 episodes with one environment after the other, so that above 1 means that
  mixing gains and below 1 that environments stand in one another's way;
- ``vs_slower_half``: the mixture over the slower of its two halves alone. One is the sandbox, handed the programs that
  the mixture ran, all at once; the other is everything else, with the sandbox's answers known beforehand. 1 is reached
  where the halves run beside one another without a pause, on processors of their own.

Then how much resident memory the last nine tenths of 10 000 episodes leave behind. ``--rounds`` and ``--episodes``
make it shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice
from statistics import median

import psutil

from agentopd.build import Judge, Skill, build_sandbox, load_skills
from agentopd.config.run import SandboxConfig, SkillConfig, SuiteConfig
from agentopd.contracts import Case, CaseResult, Program, Sandbox, SandboxLimits
from agentopd.rendering import HermesJSON
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_scripted
from agentopd.types import Task
from benchmarks.harness import Ratio, report

NAMES = ("tool_use", "math_tools", "retail", "code_repair")

Chosen = Sequence[tuple[Skill, Task]]
Tasks = dict[str, list[tuple[Skill, Task]]]
"""Of each environment."""


class Recording:
    """A sandbox that remembers what it was asked, and can answer from memory."""

    def __init__(self, inner: Sandbox) -> None:
        self._inner = inner
        self.name, self.start, self.aclose = inner.name, inner.start, inner.aclose
        self.asked: list[tuple[Program, Sequence[Case], SandboxLimits | None]] = []
        self.answers: dict[tuple[str, ...], list[CaseResult]] = {}
        self.from_memory = False

    @property
    def capabilities(self) -> frozenset[str]:
        """Those of the sandbox."""
        return self._inner.capabilities

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run them and remember them, or remember what came of them."""
        key = (program.source, *(repr(case.args) for case in cases))
        if self.from_memory:
            return [replace(answer, id=case.id) for answer, case in zip(self.answers[key], cases, strict=True)]
        self.asked.append((program, cases, limits))
        self.answers[key] = await self._inner.run_cases(program, cases, limits)
        return self.answers[key]

    def forget(self) -> None:
        """Start anew."""
        self.asked, self.answers = [], {}

    async def again(self) -> None:
        """Everything it was asked, at once."""
        await asyncio.gather(*(self._inner.run_cases(*call) for call in self.asked))


async def play(box: Recording, chosen: Chosen) -> None:
    """Play and judge all at once. Every one of them must be solved.

    The verifiers are new and the tasks distinct, so that no verdict is one that is known already.
    """
    judge = Judge({skill.name: skill for skill, _ in chosen}.values(), box)
    codec, options = HermesJSON(), RolloutOptions(sandbox=box)

    async def one(index: int, skill: Skill, task: Task) -> str:
        spec = EpisodeSpec(task, skill.env, id=str(index), skill=skill.name)
        episode = await run_scripted(spec, skill.env.gold_turns(task), codec, options=options)  # type: ignore[attr-defined]
        verdict = await judge(task, episode)
        return "" if verdict.passed else f"{skill.name}: {episode.stop_reason}, {verdict.status}: {verdict.detail}"

    unsolved = [
        line for line in await asyncio.gather(*(one(index, *item) for index, item in enumerate(chosen))) if line
    ]
    if unsolved:
        raise SystemExit(f"{len(unsolved)} gold trajectories were not judged right: {unsolved[0]}")


def mixture(tasks: Tasks, names: Sequence[str], num: int) -> Chosen:
    """``num`` episodes of the named environments in turn."""
    streams = {name: cycle(tasks[name]) for name in names}
    return [next(streams[name]) for name in islice(cycle(names), num)]


async def one_round(box: Recording, tasks: Tasks, live: int) -> dict[str, float]:
    """One ratio of each kind."""
    alone = [await seconds(play(box, mixture(tasks, [name], live))) for name in NAMES]
    apart = sum([await seconds(play(box, mixture(tasks, [name], live // len(NAMES)))) for name in NAMES])
    box.forget()
    mixed = await seconds(play(box, mixture(tasks, NAMES, live)))
    sandbox = await seconds(box.again())
    box.from_memory = True
    rest = await seconds(play(box, mixture(tasks, NAMES, live)))
    box.from_memory = False
    return {"vs_slowest": max(alone) / mixed, "vs_apart": apart / mixed, "vs_slower_half": max(sandbox, rest) / mixed}


async def seconds(work: Coroutine[object, object, None]) -> float:
    """Wall time of one piece of work."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def measure(rounds: int, episodes: int, live: int) -> None:
    """Throughput, then memory."""
    skills = load_skills(SuiteConfig(skills=tuple(SkillConfig(name=name, env=name) for name in NAMES)))
    tasks = {name: [(skill, task) for task in skill.tasks("train", live, 0)] for name, skill in skills.items()}
    box = Recording(build_sandbox(SandboxConfig(wall_s=60.0), skills.values()))
    try:
        await box.start()
        await play(box, mixture(tasks, NAMES, live))  # Warms up.
        found = [await one_round(box, tasks, live) for _ in range(rounds)]
        grown = await memory(box, tasks, episodes, live)
    finally:
        await box.aclose()
    ratios = {}
    for key, name in (
        ("vs_slowest", "mixture vs its slowest environment"),
        ("vs_apart", "mixture vs its parts in turn"),
        ("vs_slower_half", "mixture vs its slower half alone"),
    ):
        values = [ratio[key] for ratio in found]
        ratios[key] = Ratio(name, median(values), min(values), max(values), rounds)
    report(ratios, grown_mb=round(grown, 1), episodes=episodes)


async def memory(box: Recording, tasks: Tasks, episodes: int, live: int) -> float:
    """Resident MiB that the last nine tenths of the episodes added to this process and those that it started."""
    before, warm = resident(), False
    for done in range(0, episodes, live):
        if not warm and done >= episodes // 10:
            before, warm = resident(), True
        await play(box, mixture(tasks, NAMES, min(live, episodes - done)))
        box.forget()
    return (resident() - before) / 2**20


def resident() -> int:
    """Bytes of memory of this process and the sandbox's."""
    gc.collect()
    process = psutil.Process()
    total = int(process.memory_info().rss)
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--live", type=int, default=256, help="episodes at once")
    given = parser.parse_args(arguments)
    asyncio.run(measure(given.rounds, given.episodes, given.live))


if __name__ == "__main__":
    main()
