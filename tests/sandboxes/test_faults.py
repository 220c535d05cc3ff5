"""Faults of the machinery at every point: never a score, and the pool serves again afterwards."""

import asyncio
import os
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator
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


def children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


@contextmanager
def slaughter(before: set[int]) -> Iterator[None]:
    """Kill every process that appears below this one, for as long as the block lasts."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.01):
            for pid in children() - before:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_workers_that_keep_being_killed_are_no_verdict_and_the_pool_heals(jail_works: None) -> None:
    async def scenario() -> None:
        sandbox = JailSandbox(workers=2)
        before = children()
        try:
            assert (await verdict(sandbox)).outcome == 1.0
            with slaughter(before):
                fault = await verdict(sandbox, "killed")
            assert (fault.outcome, fault.reward, fault.status) == (None, None, VerdictStatus.INFRA_ERROR)
            assert (await verdict(sandbox, "healed")).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


@pytest.mark.slow
def test_one_killed_worker_costs_nothing_but_time(jail_works: None) -> None:
    async def scenario() -> None:
        sandbox = JailSandbox(workers=1)
        before = children()
        try:
            await sandbox.start()
            running = asyncio.create_task(verdict(sandbox))
            await asyncio.sleep(0.3)
            for pid in children() - before:
                os.kill(pid, signal.SIGKILL)
            assert (await running).outcome == 1.0
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


def test_a_judge_out_of_space_or_descriptors_gives_no_verdict(jail_works: None) -> None:
    async def scenario() -> None:
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
            for kind, most in ((resource.RLIMIT_FSIZE, 16), (resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")))):
                with limited(kind, most):
                    fault = await verdict(sandbox, str(kind))
                assert (fault.outcome, fault.status) == (None, VerdictStatus.INFRA_ERROR), fault
            assert (await verdict(sandbox, "healed")).outcome == 1.0
        finally:
            await sandbox.aclose()

    asyncio.run(scenario())


def test_no_deadline_hangs_on_the_clock_that_can_be_set() -> None:
    package = Path(__file__).resolve().parents[2] / "sandboxes/agentopd_sandboxes"
    settable = re.compile(r"time\.time\(|datetime|CLOCK_REALTIME")
    used = {
        path.name for path in package.glob("*.py") if settable.search(path.read_text().replace("datetime decimal", ""))
    }
    assert used == set()


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
