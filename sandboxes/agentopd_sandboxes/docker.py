"""Docker: one hardened, single-use container per program, started ahead of demand, on one engine or several.

Inside, an agent runs every case in a process of its own, with our own system-call filter on (see ``agent``). Between
two programs the container is thrown away.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, TypeVar

from agentopd.contracts import Case, CaseResult, Program, SandboxLimits
from agentopd.errors import AgentOPDError, SandboxError
from agentopd_sandboxes import image, ledger
from agentopd_sandboxes.container import Container, hardened
from agentopd_sandboxes.pool import CellDied, Worker, probe, run_program
from agentopd_sandboxes.protocol import Outcome, checked, checked_workers

COOL_DOWN_S = 20.0
"""An engine that failed is left alone for this long, if there is another."""
RUNTIME_PROBE_S = 60.0

T = TypeVar("T")
_DEFAULT_LIMITS = SandboxLimits()


class DockerSandbox:
    """Runs the cases of one program in a container that nothing else ever uses.

    ``hosts`` names engines (``unix://``, ``tcp://`` or ``ssh://``); without it ``DOCKER_HOST`` or the local socket.
    ``runtime`` is an OCI runtime of the engine, ``runsc`` say, tried under a time limit before it is used.
    """

    name: ClassVar[str] = "docker"

    def __init__(
        self,
        workers: int | None = None,
        limits: SandboxLimits = _DEFAULT_LIMITS,
        hosts: Sequence[str] = (),
        runtime: str | None = None,
        image_source: str = "auto",
    ) -> None:
        self.workers = checked_workers(workers)
        self.limits = checked(limits)
        self.runtime = runtime
        self.image_source = image_source
        self._hosts = [Engine(host) for host in hosts or (os.environ.get("DOCKER_HOST") or "",)]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free = asyncio.Semaphore(self.workers)
        self._threads: ThreadPoolExecutor | None = None
        self._spare: list[asyncio.Task[Container]] = []
        self._live: set[Container] = set()
        self._capabilities: frozenset[str] = frozenset()

    @property
    def capabilities(self) -> frozenset[str]:
        """What isolation is in force; empty before ``start``."""
        return self._capabilities

    async def start(self) -> None:
        """Build the image if need be, start and probe a first container. Idempotent.

        Raises ``SandboxError`` naming what to install, start or set.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            await self.aclose()
            self._loop, self._free = loop, asyncio.Semaphore(self.workers)
            self._threads = ThreadPoolExecutor(3 * self.workers + 2, "agentopd-docker")
        if not self._capabilities:
            try:
                async with asyncio.timeout(RUNTIME_PROBE_S if self.runtime else None):
                    async with self.lease() as worker:
                        await probe(worker, self.limits)
            except TimeoutError:
                raise SandboxError(
                    f"the runtime {self.runtime!r} did not run a container within {RUNTIME_PROBE_S:g} s; "
                    "repair it, or leave sandbox.runtime out"
                ) from None

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own fresh process, all of them in containers of this program alone.

        Raises ``SandboxError`` for a fault of the machinery, ``TaskError`` for arguments that are not plain data.
        """
        await self.start()
        return await run_program(self, program, cases, self.limits if limits is None else checked(limits))

    async def aclose(self) -> None:
        """Remove every container; idempotent."""
        spare, self._spare = self._spare, []
        for task in spare:
            if task.get_loop() is self._loop:
                await asyncio.gather(task, return_exceptions=True)
        for container in list(self._live):
            container.remove()
        self._live.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        self._threads, self._loop, self._capabilities = None, None, frozenset()
        for engine in self._hosts:
            engine.close()

    @classmethod
    def prune(cls, hosts: Sequence[str] = ()) -> list[str]:
        """Remove every container whose owner no longer runs or whose deadline is over; their ids."""
        gone = []
        for host in hosts or (os.environ.get("DOCKER_HOST") or "",):
            engine = Engine(host)
            try:
                gone += engine.prune()
            finally:
                engine.close()
        return gone

    # --- the pool ----------------------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Whether a container may start for one more program."""
        return not self._free.locked()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[_Lease]:
        """The containers of one program: one, and another only if that one cannot go on."""
        async with self._free:
            lease = _Lease(self)
            try:
                yield lease
            finally:
                lease.end()
                self._prepare()

    def discard(self, worker: Worker) -> None:
        """Remove the containers of a program whose agent went silent."""
        assert isinstance(worker, _Lease)
        worker.end()

    async def take(self, limits: SandboxLimits) -> Container:
        """A container nobody has used: one that was started ahead of demand, if it has the right limits."""
        if hardened(limits) == hardened(self.limits):
            while self._spare:
                try:
                    container = await self._spare.pop(0)
                except AgentOPDError:
                    continue  # the engine failed when it was asked ahead of demand; ask again
                if container.waits():
                    return container
                self.retire(container)  # it ended while nobody used it
        return await self._in_thread(lambda: self._start_container(limits))

    def _prepare(self) -> None:
        if self._loop is None or self._threads is None:
            return
        while len(self._spare) < self.workers:
            self._spare.append(self._loop.create_task(self._in_thread(lambda: self._start_container(self.limits))))

    def retire(self, container: Container) -> None:
        """Remove a container without waiting for it."""
        if self._threads is not None:
            self._threads.submit(self._remove, container)

    def _remove(self, container: Container) -> None:
        container.remove()
        self._live.discard(container)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._loop is None or self._threads is None:
            raise SandboxError("the sandbox was closed")
        return await self._loop.run_in_executor(self._threads, work)

    async def call(self, container: Container, request: bytes, limits: SandboxLimits) -> Outcome:
        """Run one request in a container."""
        return await self._in_thread(lambda: container.call(request, limits))

    def _start_container(self, limits: SandboxLimits) -> Container:
        """On the engine with the fewest containers of ours; a failing one is passed over while there is another."""
        fault: SandboxError | None = None
        for engine in sorted(
            self._hosts, key=lambda engine: (engine.failed_at + COOL_DOWN_S > time.monotonic(), engine.live)
        ):
            try:
                container = engine.start(limits, self.runtime, self.image_source)
            except SandboxError as exc:
                engine.failed_at, fault = time.monotonic(), exc
                continue
            self._live.add(container)
            self._capabilities = container.capabilities | {
                "pid", "mount", "net", "ipc", "uts", "cgroup", "read_only", "memory_total", "pids",
                *({f"runtime:{self.runtime}"} if self.runtime else ()),
            }  # fmt: skip
            return container
        raise fault or SandboxError("no Docker engine is configured")


class _Lease:
    """One program's containers."""

    def __init__(self, sandbox: DockerSandbox) -> None:
        self.sandbox = sandbox
        self.container: Container | None = None

    async def cell(self, limits: SandboxLimits) -> _Lease:
        """Itself, with a container that can go on."""
        if self.container is None or not self.container.usable:
            self.end()
            self.container = await self.sandbox.take(limits)
        return self

    async def call(self, request: bytes, limits: SandboxLimits) -> Outcome:
        """Run one encoded request in a fresh process."""
        assert self.container is not None
        return await self.sandbox.call(self.container, request, limits)

    def end(self) -> None:
        """Throw the container away."""
        if self.container is not None:
            self.sandbox.retire(self.container)
            self.container = None


class Engine:
    """One Docker engine."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.failed_at = float("-inf")
        self.live = 0
        self._client: Any = None
        self._image = ""

    def client(self) -> Any:
        """A connected client; ``SandboxError`` says what to install or start."""
        try:
            import docker
        except ImportError:
            raise SandboxError("the docker sandbox needs the Docker SDK: pip install 'agentopd[docker]'") from None
        if self._client is None:
            where = self.host or "the local socket"
            client = None
            try:
                self.knock()
                client = docker.DockerClient(base_url=self.host or None, timeout=60, max_pool_size=32)
                client.ping()
                self._client = client
            except Exception as exc:
                if client is not None:
                    client.close()
                raise SandboxError(
                    f"no Docker engine at {where}: {exc}; start one, or set DOCKER_HOST or sandbox.hosts"
                ) from exc
        return self._client

    def knock(self) -> None:
        """Raise ``OSError`` if nobody listens at a local socket: the SDK finds out too, but leaves a socket open."""
        path = self.host.removeprefix("unix://") or "/var/run/docker.sock"
        if self.host in ("", f"unix://{path}"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(path)

    def start(self, limits: SandboxLimits, runtime: str | None, image_source: str) -> Container:
        """Start one container; ``SandboxError`` if the engine does not."""
        try:
            client = self.client()
            self.knock()
            if not self._image:
                self._image = image.ensure(client, image_source)
            mine = client.api.containers(all=True, quiet=True, filters={"label": ledger.LABEL})
            self.live = len(mine)
            ledger.check_room(self.live)
            return Container(client, self._image, limits, runtime, self.knock)
        except SandboxError as exc:
            if isinstance(exc, CellDied):
                raise SandboxError(str(exc)) from exc
            raise
        except Exception as exc:
            self.close()  # perhaps the engine went away: connect anew next time
            raise SandboxError(f"the Docker engine at {self.host or 'the local socket'}: {exc}") from exc

    def prune(self) -> list[str]:
        """Remove every sandbox whose owner or deadline is gone; their ids."""
        client, gone = self.client(), []
        for found in client.api.containers(all=True, filters={"label": ledger.LABEL}):
            if ledger.is_stale(found["Labels"]):
                with suppress(Exception):  # the engine may be removing it already
                    client.api.remove_container(found["Id"], force=True, v=True)
                gone.append(found["Id"][:12])
        return gone

    def close(self) -> None:
        """Let go of the connection."""
        if self._client is not None:
            self._client.close()
        self._client = None


def build_image(source: str = "auto") -> str:
    """Build the sandbox image on the engine of ``DOCKER_HOST``, again even if it is there; its name."""
    engine = Engine(os.environ.get("DOCKER_HOST") or "")
    try:
        name = image.tag()
        image.build(engine.client(), name, source)
        return name
    finally:
        engine.close()
