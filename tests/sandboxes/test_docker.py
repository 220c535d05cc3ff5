"""The Docker backend, on a real engine."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from agentopd.contracts import Case, CaseStatus, Program, Sandbox, SandboxLimits
from agentopd.errors import SandboxError
from agentopd.testing import CATALOGUE, LIMITS, check_sandbox
from agentopd_sandboxes import ledger
from agentopd_sandboxes.container import _STDOUT, _STREAM, HELLO, REPLY, Container, hardened
from agentopd_sandboxes.docker import DockerSandbox

T = TypeVar("T")
NOWHERE = "unix:///nowhere/docker.sock"


def with_sandbox(work: Callable[[DockerSandbox], Awaitable[T]], **options: Any) -> T:
    async def scenario() -> T:
        sandbox = DockerSandbox(workers=1, **options)
        try:
            return await work(sandbox)
        finally:
            await sandbox.aclose()

    return asyncio.run(scenario())


def test_an_engine_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(SandboxError, match=r"no Docker engine at unix:///nowhere.*DOCKER_HOST"):
        with_sandbox(lambda sandbox: sandbox.start(), hosts=(NOWHERE,))


def test_every_wall_is_asked_for() -> None:
    flags = hardened(SandboxLimits(memory_mb=100, processes=8))
    assert flags["network_mode"] == "none" and flags["read_only"] and flags["init"]
    assert flags["cap_drop"] == ["ALL"] and "no-new-privileges:true" in flags["security_opt"]
    assert flags["mem_limit"] == flags["memswap_limit"] == "164m"
    assert flags["pids_limit"] == 12 and flags["nano_cpus"] == 10**9
    assert flags["ipc_mode"] == "private" and flags["log_config"] == {"type": "none"}
    (profile,) = (option for option in flags["security_opt"] if option.startswith("seccomp="))
    assert all(f'"{call}"' in profile for call in ("ptrace", "io_uring_setup", "bpf", "userfaultfd", "unshare"))


def test_owners_are_told_apart() -> None:
    mine = ledger.labels()
    assert not ledger.is_stale(mine)
    assert ledger.is_stale({**mine, ledger.DEADLINE: "1"})
    me = ledger.Owner.me()
    assert ledger.is_stale({**mine, ledger.OWNER: f"{me.boot}:{me.pid}:{int(me.started) - 1}"}), "a pid used again"
    assert ledger.is_stale({ledger.LABEL: "1"})
    assert not ledger.is_stale({**mine, ledger.OWNER: f"another-boot:{me.pid}:{me.started}", ledger.DEADLINE: "1"})
    with pytest.raises(SandboxError, match="sandbox prune"):
        ledger.check_room(ledger.MAX_LIVE)


class Api:
    """An engine whose containers greet; ``inner`` are the agents' ends of their sockets."""

    def __init__(self) -> None:
        self.inner: list[socket.socket] = []

    def create_host_config(self, **options: Any) -> None: ...

    def create_container(self, *args: Any, **options: Any) -> dict[str, str]:
        return {"Id": str(len(self.inner))}

    def attach_socket(self, id_: str, params: dict[str, int]) -> socket.socket:
        ours, inner = socket.socketpair()
        self.inner.append(inner)
        return ours

    def start(self, id_: str) -> None:
        hello = HELLO + REPLY.pack(2, 0, 0) + b"[]"
        self.inner[int(id_)].sendall(_STREAM.pack(_STDOUT, len(hello)) + hello)

    def remove_container(self, id_: str, **options: Any) -> None:
        self.inner[int(id_)].close()


def test_a_container_that_ended_while_nobody_used_it_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    client = SimpleNamespace(api=api)
    start = lambda limits, *rest: Container(client, "image", limits, None, lambda: None)  # noqa: E731

    async def scenario() -> None:
        sandbox = DockerSandbox(workers=2)
        monkeypatch.setattr(sandbox._hosts[0], "start", start)
        sandbox._loop, sandbox._threads = asyncio.get_running_loop(), ThreadPoolExecutor(2)
        sandbox._prepare()
        dead, alive = await asyncio.gather(*sandbox._spare)
        api.inner[int(dead.id)].close()
        assert await sandbox.take(sandbox.limits) is alive
        api.inner[int(alive.id)].close()
        assert (await sandbox.take(sandbox.limits)).waits()
        await sandbox.aclose()
        assert all(inner.fileno() < 0 for inner in api.inner)

    asyncio.run(scenario())


@pytest.mark.docker
@pytest.mark.slow
def test_cases_run_in_a_container_of_their_own_program(docker_client: Any) -> None:
    source = """
import os, socket
def f(i):
    seen = [os.path.exists(p) for p in ('/tmp/mark', '/work/mark', '/dev/shm/mark')]
    for place in ('/tmp', '/work', '/dev/shm'): open(place + '/mark', 'w').close()
    return i, seen, os.getuid()
"""

    async def work(sandbox: DockerSandbox) -> None:
        assert isinstance(sandbox, Sandbox)
        await sandbox.start()
        assert {"net", "seccomp", "read_only", "pids"} <= sandbox.capabilities
        results = await sandbox.run_cases(Program(source), [Case(str(i), "f(*args)", args=(i,)) for i in range(6)])
        assert [result.value for result in results] == [(i, [False] * 3, 65534) for i in range(6)]
        (loop,) = await sandbox.run_cases(
            Program(""), [Case("a", "sum(range(10**15))")], SandboxLimits(wall_s=0.5, cpu_s=2)
        )
        assert loop.status is CaseStatus.TIMEOUT
        live = docker_client.api.containers(all=True, filters={"label": f"{ledger.OWNER}={ledger.Owner.me()}"})
        assert live

    with_sandbox(work)
    assert not docker_client.api.containers(all=True, filters={"label": f"{ledger.OWNER}={ledger.Owner.me()}"})


@pytest.mark.docker
@pytest.mark.slow
def test_a_killed_container_is_replaced_and_a_dead_engine_passed_over(docker_client: Any) -> None:
    async def work(sandbox: DockerSandbox) -> None:
        await sandbox.start()
        task = asyncio.create_task(sandbox.run_cases(Program("import time"), [Case("a", "time.sleep(2) or 1")]))
        await asyncio.sleep(0.5)
        for container in list(sandbox._live):
            with suppress(Exception):
                docker_client.api.kill(container.id)
        (result,) = await task
        assert result.value == 1

    with_sandbox(work, hosts=(NOWHERE, os.environ.get("DOCKER_HOST") or ""))


ABANDON = """
import asyncio, os, signal
from agentopd_sandboxes.docker import DockerSandbox
async def main():
    sandbox = DockerSandbox(workers=1)
    await sandbox.start()
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.docker
@pytest.mark.slow
def test_nothing_is_left_of_a_killed_trainer_after_prune(docker_client: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", ABANDON], stdout=subprocess.PIPE, env=environment) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
    pid = f":{trainer.pid}:"
    deadline = time.monotonic() + 30
    while True:
        DockerSandbox.prune()
        rows = docker_client.api.containers(all=True, filters={"label": ledger.LABEL})
        left = [row for row in rows if pid in row["Labels"][ledger.OWNER]]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert not left


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_suite_passes_on_docker(docker_client: Any) -> None:
    findings = with_sandbox(lambda sandbox: check_sandbox(sandbox, CATALOGUE), limits=LIMITS)
    assert [finding for finding in findings if not finding.ok] == []
