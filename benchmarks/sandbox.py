"""Verdicts a second: the jail, a warm ``docker exec``, ``docker run`` and the Docker backend, on the same ten asserts.

A verdict here is one program and ten calls of it, whose values come back and are compared by the judge. The two Docker
command lines evaluate all ten in one bare interpreter (`python3 -I -S`), which is the least they can do; so do ours for
the gated figures. ``*_processes`` are the same ten as ten cases, each in a process of its own, as the code verifier
runs them. Rounds are interleaved, so that a machine whose speed drifts changes all alike.

``python -m benchmarks.sandbox [--verdicts N]``; the Docker figures need an engine at ``DOCKER_HOST``.
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
from collections.abc import Awaitable, Callable
from pathlib import Path

from agentopd.contracts import Case, Program, Sandbox
from agentopd.errors import SandboxError
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.docker import DockerSandbox
from agentopd_sandboxes.image import tag
from agentopd_sandboxes.ledger import LABEL

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
    """Verdicts per second with as many at once as there are workers."""
    end, done = time.perf_counter() + seconds, 0
    started = time.perf_counter()

    async def loop() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await verdict()
            done += 1

    await asyncio.gather(*(loop() for _ in range(workers)))
    return done / (time.perf_counter() - started)


def memory_kb() -> int:
    """Resident memory of this process and everything below it."""
    todo, total = [str(os.getpid())], 0
    while todo:
        pid = todo.pop()
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += (task / "children").read_text().split()
        except OSError:
            continue
    return total


async def growth(sandbox: Sandbox, verdicts: int) -> dict[str, float]:
    """Whether the last tenth of a long run costs what the first did, in time and in memory."""
    verdict, times, sizes = of(sandbox, TOGETHER), [], []
    for index in range(verdicts):
        times.append(await milliseconds(verdict))
        if index % max(1, verdicts // 20) == 0:
            sizes.append(memory_kb())
    tenth = max(1, verdicts // 10)
    late = statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
    return {"verdicts": verdicts, "late_vs_early": round(late, 3), "memory_growth_kb": sizes[-1] - sizes[1]}


async def measure(rounds: int, verdicts: int) -> dict[str, float]:
    """All figures; Docker's are missing without an engine."""
    workers = os.cpu_count() or 1
    jail, docker = JailSandbox(workers), DockerSandbox(workers)
    arms = {"jail": of(jail, TOGETHER), "jail_processes": of(jail, APART)}
    name = f"agentopd-bench-{uuid.uuid4().hex[:8]}"
    figures: dict[str, float] = {"load_before": os.getloadavg()[0], "cores": workers}
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
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, verdict in arms.items():
                times[arm] += [await milliseconds(verdict) for _ in range(5 if arm.startswith("jail") else 1)]
                await asyncio.sleep(1.0 if arm.startswith("docker") else 0.02)  # demand comes in bursts
        for arm, found in times.items():
            figures[f"{arm}_median_ms"] = round(statistics.median(found), 2)
        for arm, verdict in arms.items():
            figures[f"{arm}_per_s"] = round(await throughput(verdict, workers, 6.0), 2)
        figures |= ratios(figures)
        figures |= await growth(jail, verdicts)
    finally:
        await jail.aclose()
        await docker.aclose()
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, check=False)
    return figures | {"load_after": os.getloadavg()[0]}


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """Throughput against throughput, on all cores."""
    if "docker_run_per_s" not in figures:
        return {}
    jail, ours = figures["jail_per_s"], figures["docker_per_s"]
    return {
        "jail_vs_docker_exec": round(jail / figures["docker_exec_per_s"], 2),
        "jail_vs_docker_run": round(jail / figures["docker_run_per_s"], 2),
        "docker_vs_docker_run": round(figures["docker_run_median_ms"] / figures["docker_median_ms"], 2),
        "docker_vs_docker_run_sustained": round(ours / figures["docker_run_per_s"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--verdicts", type=int, default=10_000)
    options = parser.parse_args()
    figures = asyncio.run(measure(options.rounds, options.verdicts))
    for key, value in figures.items():
        print(f"{key:32} {value:>10}")
    if figures["load_before"] > (os.cpu_count() or 1) / 2:
        print("other work was running: these figures are not those of the machine")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
