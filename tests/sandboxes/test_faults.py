"""Faults of the machinery at every point: never a score, and the pool serves again afterwards."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agentopd.contracts import Case, Program, Sandbox
from agentopd.errors import SandboxError
from agentopd.scoring import judge
from agentopd.types import Episode, Message, StopReason, Task, Turn, Verdict, VerdictStatus
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.docker import DockerSandbox
from agentopd_verifiers.code import CodeVerifier

StartPython = Callable[[str], "subprocess.Popen[str]"]
HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
SOURCE = "import time\ndef f(x):\n    time.sleep(0.2)\n    return x + 1\n"
TASK = Task(
    id="t",
    env="code_repair",
    split="train",
    prompt=(Message(role="user", content="fix f"),),
    hidden={"cases": [{"id": str(i), "expression": f"f({i})", "expected": i + 1} for i in range(3)]},
)


def episode(source: str) -> Episode:
    return Episode(
        id="e",
        task_id=TASK.id,
        task_hash=TASK.hash,
        env=TASK.env,
        split=TASK.split,
        prompt_ids=(0,),
        turns=(Turn(token_ids=(1,), rollout_logprobs=(0.0,), text="done"),),
        stop_reason=StopReason.COMPLETED,
        final_state={"program": source, "submitted": True},
    )


async def verdict(sandbox: Sandbox, note: str = "") -> Verdict:
    """With a fresh verifier, and a source of its own, so that nothing is remembered."""
    return await judge(TASK, episode(f"{SOURCE}# {note}\n"), CodeVerifier(), sandbox)


PARTS = {"keeper": 1, "fork server": 2, "case": 3}
"""The processes of a jail, by how far they are below the judge's."""


def alive(part: str) -> set[int]:
    found = {os.getpid()}
    for _ in range(PARTS[part]):
        found = set().union(*map(children, found))
    return found


def children(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def kill(part: str, before: set[int]) -> None:
    for pid in alive(part) - before:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def slaughter(part: str, before: set[int]) -> Iterator[None]:
    """Kill every such process that appears, for as long as the block lasts."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.005):
            kill(part, before)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_parts_that_keep_being_killed_are_no_verdict_and_the_pool_heals(jail_works: None, part: str) -> None:
    async def scenario() -> None:
        sandbox, before = JailSandbox(workers=2), alive(part)
        try:
            assert (await verdict(sandbox)).outcome == 1.0
            with slaughter(part, before):
                fault = await verdict(sandbox, "killed")
            assert (fault.outcome, fault.reward, fault.status) == (None, None, VerdictStatus.INFRA_ERROR)
            assert (await verdict(sandbox, "healed")).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_one_killed_part_costs_nothing_but_time(jail_works: None, part: str) -> None:
    async def scenario() -> None:
        sandbox, before = JailSandbox(workers=1), alive(part)
        try:
            await sandbox.start()
            running = asyncio.create_task(verdict(sandbox))
            await asyncio.sleep(0.3)
            assert alive(part) - before
            kill(part, before)
            assert (await running).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


@pytest.mark.slow
def test_workers_that_died_while_idle_cost_nothing_but_time(jail_works: None) -> None:
    async def scenario() -> None:
        sandbox, before = JailSandbox(workers=2), alive("keeper")
        try:
            await asyncio.gather(verdict(sandbox, "a"), verdict(sandbox, "b"))
            assert len(alive("keeper") - before) == 2
            kill("keeper", before)
            await asyncio.sleep(1)
            assert (await verdict(sandbox, "after")).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.slow
def test_a_judge_out_of_space_or_descriptors_gives_no_verdict(jail_works: None) -> None:
    async def scenario() -> None:
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
            for kind, most in ((resource.RLIMIT_FSIZE, 16), (resource.RLIMIT_NOFILE, 3)):
                with limited(kind, most):
                    fault = await verdict(sandbox, str(kind))
                assert (fault.outcome, fault.status) == (None, VerdictStatus.INFRA_ERROR), fault
            assert (await verdict(sandbox, "healed")).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


ON_A_FULL_DISK = """
import asyncio, os, tempfile
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot leave its user namespace
from test_faults import verdict
from agentopd_sandboxes import JailSandbox, linux
from agentopd_sandboxes.unsafe import UnsafeSandbox

tempfile.tempdir = DISK
maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
for name, text in maps.items():
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
linux.mount("tmpfs", DISK, "tmpfs", 0, "size=8k")

async def outcomes():
    for sandbox in (JailSandbox(workers=1), UnsafeSandbox(workers=1)):
        found = await verdict(sandbox)
        print(sandbox.name, found.outcome, found.status.value, found.detail)
        await sandbox.aclose()

with open(f"{DISK}/full", "wb") as full:
    full.write(bytes(8192))
asyncio.run(outcomes())
os.unlink(f"{DISK}/full")
asyncio.run(outcomes())
"""


@pytest.mark.slow
def test_a_full_disk_is_no_verdict_and_the_jail_needs_none(
    jail_works: None, start_python: StartPython, tmp_path: Path
) -> None:
    with start_python(HERE + f"DISK = {str(tmp_path)!r}\n" + ON_A_FULL_DISK) as judge:
        full, unsafe, *healed = judge.communicate(timeout=120)[0].splitlines()
    assert full == "jail 1.0 ok "
    assert unsafe.startswith("unsafe None infra_error") and "No space left" in unsafe
    assert healed == ["jail 1.0 ok ", "unsafe 1.0 ok "]


JUMPING = """
import itertools, time
time.time = lambda clock=time.time, jump=itertools.cycle((-1e9, 1e9)).__next__: clock() + jump()
time.time_ns = lambda clock=time.time: int(clock() * 1e9)
"""
"""The clock is set ten years back and forth, each time somebody looks at it."""

UNDER_A_JUMPING_CLOCK = """
import asyncio
from test_faults import verdict
from agentopd.contracts import Case, Program, SandboxLimits
from agentopd_sandboxes import JailSandbox, slot

slot._ZYGOTE = JUMPING + slot._ZYGOTE

async def scenario():
    sandbox = JailSandbox(workers=2)
    print((await verdict(sandbox)).outcome)
    program = Program("import time\\ndef f(s): return time.sleep(s) or abs(time.time() - time.time()) > 1e9")
    cases = [Case(str(s), f"f({s})") for s in (0.5, 9)]
    results = await sandbox.run_cases(program, cases, SandboxLimits(wall_s=1.0))
    print([(result.status.value, result.value) for result in results])
    await sandbox.aclose()

asyncio.run(scenario())
"""


@pytest.mark.slow
def test_no_deadline_hangs_on_the_clock_that_can_be_set(jail_works: None, start_python: StartPython) -> None:
    with start_python(HERE + f"JUMPING = {JUMPING!r}\nexec(JUMPING)\n" + UNDER_A_JUMPING_CLOCK) as judge:
        first, second = judge.communicate(timeout=120)[0].splitlines()
    assert first == "1.0"
    assert second == "[('value', True), ('timeout', None)]"


class Relay:
    """A socket in front of an engine that can be cut, as if the engine had been stopped."""

    def __init__(self, engine: str, path: Path) -> None:
        self.engine = engine.removeprefix("unix://") or "/var/run/docker.sock"
        self.path = path
        self.pairs: list[socket.socket] = []
        self.server: socket.socket | None = None

    def up(self) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen()
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self.engine)
                self.pairs += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def down(self) -> None:
        for end in [*([self.server] if self.server else []), *self.pairs]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.pairs.clear()
        self.path.unlink(missing_ok=True)


@pytest.mark.docker
@pytest.mark.slow
def test_an_engine_stopped_in_the_middle_is_no_verdict_and_serves_again(docker_client: Any, tmp_path: Path) -> None:
    relay = Relay(os.environ.get("DOCKER_HOST") or "", tmp_path / "d.sock")

    async def scenario() -> None:
        sandbox = DockerSandbox(workers=1, hosts=(f"unix://{relay.path}",))
        try:
            relay.up()
            await sandbox.start()
            running = asyncio.create_task(verdict(sandbox))
            await asyncio.sleep(0.2)
            relay.down()
            fault = await running
            assert (fault.outcome, fault.status) == (None, VerdictStatus.INFRA_ERROR), fault
            with pytest.raises(SandboxError, match="no Docker engine"):
                await sandbox.run_cases(Program(""), [Case("a", "1")])
            relay.up()
            assert (await verdict(sandbox, "healed")).outcome == 1.0
        finally:
            await sandbox.aclose()
            DockerSandbox.prune()

    try:
        asyncio.run(scenario())
    finally:
        relay.down()
