"""Verdicts a second: the jail, a warm ``docker exec``, ``docker run`` and the Docker backend, on the same ten asserts.

A verdict here is one program and ten calls of it, whose values come back and are compared by the judge. The two Docker
command lines evaluate all ten in one bare interpreter (`python3 -I -S`), which is the least they can do; so do ours for
the gated figures. ``*_processes`` are the same ten as ten cases, each in a process of its own, as the code verifier
runs them. Rounds are interleaved, so that a machine whose speed drifts changes all alike; a ratio is one of throughputs
within a round, on all cores.

Then one jail gives ``--verdicts`` verdicts: what the latest cost against the earliest, in wall time and in processor
time of all its processes, and what memory they left behind.

``python -m benchmarks.sandbox [--rounds N] [--seconds S] [--verdicts N]``; the Docker figures need an engine at
``DOCKER_HOST``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import psutil

from agentopd.contracts import Case, Program, Sandbox
from agentopd.errors import SandboxError
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.docker import DockerSandbox
from agentopd_sandboxes.image import tag
from agentopd_sandboxes.ledger import LABEL
from benchmarks.harness import Ratio, report

SOURCE = "def f(n):\n    return sorted(str(n ** k) for k in range(5))[-1]\n"
INPUTS = list(range(10))
space: dict[str, Callable[[int], str]] = {}
exec(SOURCE, space)
EXPECTED = [space["f"](n) for n in INPUTS]
TOGETHER = [Case("all", "[f(n) for n in args]", args=tuple(INPUTS))]
APART = [Case(str(n), "f(*args)", args=(n,)) for n in INPUTS]
SCRIPT = f"import json, sys\nexec(sys.stdin.read())\nprint(json.dumps([f(n) for n in {INPUTS}]))"
BARE = ["python3", "-I", "-S", "-B", "-c", SCRIPT]
SLEEP = ["python3", "-c", "import time; time.sleep(9999)"]
HARDENED = [
    "--rm", "-i", "--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--init",
    "--pids-limit=36", "--memory=576m", "--memory-swap=576m", "--cpus=1", "--user=65534:65534", "--ipc=private",
    "--log-driver=none", "--tmpfs=/work", "--tmpfs=/tmp",
]  # fmt: skip

AHEAD_OF_DEMAND = ("docker", "docker_processes")
"""Arms whose next container takes longer to start than a command line takes to type."""

Verdict = Callable[[], Awaitable[None]]


def of(sandbox: Sandbox, cases: list[Case]) -> Verdict:
    """One verdict by a sandbox of ours."""

    async def verdict() -> None:
        # a name of its own makes every program a new one
        program = Program(f"{SOURCE}# {uuid.uuid4()}\n")
        results = await sandbox.run_cases(program, cases)
        values = results[0].value if len(results) == 1 else [result.value for result in results]
        assert values == EXPECTED, results

    return verdict


def by_command(arguments: list[str]) -> Verdict:
    """One verdict by Docker's command line."""

    async def verdict() -> None:
        process = await asyncio.create_subprocess_exec(
            "docker", *arguments, *BARE, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate(SOURCE.encode())
        assert json.loads(out) == EXPECTED, out

    return verdict


async def milliseconds(verdict: Verdict) -> float:
    started = time.perf_counter()
    await verdict()
    return (time.perf_counter() - started) * 1000


async def throughput(verdict: Verdict, workers: int, seconds: float) -> float:
    """Verdicts per second with as many at once as there are workers, once what was made ahead of demand is used up."""
    await asyncio.gather(*(verdict() for _ in range(workers)))
    started, done = time.perf_counter(), 0

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < started + seconds:
            await verdict()
            done += 1

    await asyncio.gather(*(loop() for _ in range(workers)))
    return done / (time.perf_counter() - started)


def tree() -> Iterator[psutil.Process]:
    """The calling process and everything below it that still runs."""
    me = psutil.Process()
    yield from (me, *me.children(recursive=True))


def used() -> tuple[float, float]:
    """Processor seconds so far and resident MiB now, of the whole tree."""
    cpu = memory = 0.0
    for process in tree():
        with suppress(psutil.NoSuchProcess):
            cpu += sum(process.cpu_times()[:4])  # its own and those of its children that ended
            memory += process.memory_info().rss / 2**20
    return cpu, memory


async def growth(sandbox: Sandbox, verdicts: int) -> dict[str, float]:
    """What verdicts cost and leave behind, the latest tenth against the earliest; a row for each tenth."""
    verdict, tenth = of(sandbox, TOGETHER), max(1, verdicts // 10)
    rows: list[tuple[float, float, float]] = []
    for index in range(10):
        before, _ = used()
        times = [await milliseconds(verdict) for _ in range(tenth)]
        await asyncio.sleep(0.2)  # what is on its way out is not memory that grows
        cpu, memory = used()
        rows.append((statistics.median(times), (cpu - before) * 1000 / tenth, memory))
        print(f"{(index + 1) * tenth:>7} verdicts  {rows[-1][0]:6.2f} ms  {rows[-1][1]:6.2f} ms CPU  {memory:7.1f} MiB")
    (first_ms, first_cpu, first_mb), (last_ms, last_cpu, last_mb) = rows[0], rows[-1]
    return {
        "verdicts": 10 * tenth,
        "late_vs_early": round(last_ms / first_ms, 3),
        "late_vs_early_cpu": round(last_cpu / first_cpu, 3),
        "memory_growth_mb": round(last_mb - first_mb, 1),
    }


async def latency(arms: dict[str, Verdict], rounds: int) -> dict[str, float]:
    """Median of one verdict at a time, in bursts with a pause between."""
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, verdict in arms.items():
            times[arm] += [await milliseconds(verdict) for _ in range(5 if arm.startswith("jail") else 1)]
            await asyncio.sleep(1.0 if arm in AHEAD_OF_DEMAND else 0.02)
    for arm, found in times.items():
        low, *_, high = statistics.quantiles(found, n=10)
        print(f"{arm:<20} {statistics.median(found):8.2f} ms  ({low:.2f} to {high:.2f} for 8 of 10)")
    return {f"{arm}_median_ms": round(statistics.median(found), 2) for arm, found in times.items()}


async def rates(arms: dict[str, Verdict], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Verdicts per second of each arm, one figure per round."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, verdict in arms.items():
            found[arm].append(await throughput(verdict, os.cpu_count() or 1, seconds))
    return found


def ratio(name: str, ours: list[float], theirs: list[float]) -> Ratio:
    """Round by round."""
    found = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Ratio(name, statistics.median(found), min(found), max(found), len(found))


async def measure(rounds: int, seconds: float, verdicts: int) -> None:
    """All figures; Docker's are missing without an engine."""
    workers, load = os.cpu_count() or 1, os.getloadavg()[0]
    jail, docker = JailSandbox(workers), DockerSandbox(workers)
    arms = {"jail": of(jail, TOGETHER), "jail_processes": of(jail, APART)}
    name = f"agentopd-bench-{uuid.uuid4().hex[:8]}"
    try:
        await jail.start()
        try:
            await docker.start()
            subprocess.run(
                ["docker", "run", "-d", "--name", name, "--label", f"{LABEL}=1", *HARDENED, tag(), *SLEEP],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            arms |= {
                "docker": of(docker, TOGETHER),
                "docker_processes": of(docker, APART),
                "docker_exec": by_command(["exec", "-i", name]),
                "docker_run": by_command(["run", *HARDENED, tag()]),
            }
        except SandboxError as exc:
            print(f"without Docker: {exc}")
        figures = await latency(arms, 4 * rounds)
        found = await rates(arms, rounds, seconds)
        figures |= {f"{arm}_per_s": round(statistics.median(rate), 2) for arm, rate in found.items()}
        figures |= await growth(jail, verdicts)
    finally:
        await jail.aclose()
        await docker.aclose()
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)
    pairs = ("jail", "docker_exec"), ("jail", "docker_run"), ("docker", "docker_run")
    ratios = {f"{a}_vs_{b}": ratio(f"{a} vs {b}", found[a], found[b]) for a, b in pairs if b in found}
    if load > workers / 2:
        print("other work was running: these figures are not those of the machine")
    report(ratios, **figures, cores=workers, load_before=load, load_after=os.getloadavg()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--verdicts", type=int, default=10_000)
    options = parser.parse_args()
    asyncio.run(measure(options.rounds, options.seconds, options.verdicts))


if __name__ == "__main__":
    main()
