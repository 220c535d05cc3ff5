"""The namespace jail: no daemon, no other program, no root where the kernel allows user namespaces.

Each worker is a zygote (an interpreter already inside its own namespaces) that makes one cell per case: a process in
fresh namespaces, prepared ahead of demand. See ``zygote`` and ``warden`` for what runs inside, ``cell`` and ``case``
for the locks on a payload, ``namespaces`` for what it can see.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import ClassVar

from agentopd.contracts import Case, CaseResult, Program, SandboxLimits
from agentopd.errors import ConfigError, SandboxError
from agentopd_sandboxes.pool import CellDied, Worker, run_program
from agentopd_sandboxes.pool import probe as probe_worker
from agentopd_sandboxes.protocol import checked, checked_workers
from agentopd_sandboxes.slot import Cell, Zygote

RECYCLE_AFTER = 4000
"""Cells after which a zygote is replaced, so that whatever it may have gathered is bounded."""
AHEAD = 2
"""Cells of a worker that are made ahead of demand."""
_DEFAULT_LIMITS = SandboxLimits()


class JailSandbox:
    """Runs each case in a process of its own, inside Linux namespaces that no other program shares.

    ``workers`` programs run at once (default: one per CPU core), and a program with many cases uses all that are free;
    workers start when first needed. ``libraries`` names pure-Python packages of this interpreter that programs may
    import, read-only; beyond them there is the standard library. One instance may be shared by all coroutines of a
    loop, and used again from another loop once the first has ended.
    """

    name: ClassVar[str] = "jail"

    def __init__(
        self, workers: int | None = None, limits: SandboxLimits = _DEFAULT_LIMITS, libraries: Sequence[str] = ()
    ) -> None:
        self.workers = checked_workers(workers)
        self.limits = checked(limits)
        self._libraries = {name: _location(name) for name in libraries}
        self._idle: deque[_Worker] = deque()
        self._all: set[_Worker] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free = asyncio.Semaphore(self.workers)
        self._capabilities: frozenset[str] = frozenset()

    @property
    def capabilities(self) -> frozenset[str]:
        """What isolation is in force; empty before ``start``."""
        return self._capabilities

    async def start(self) -> None:
        """Start and probe a first worker; ``SandboxError`` names what to install or change. Idempotent."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._close_all()
            self._loop = loop
            self._free = asyncio.Semaphore(self.workers)
        if not self._all:
            async with self.lease():
                pass

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own fresh, isolated process; results in the order of ``cases``.

        Raises ``SandboxError`` for a fault of the machinery, ``TaskError`` for arguments that are not plain data.
        """
        await self.start()
        return await run_program(self, program, cases, self.limits if limits is None else checked(limits))

    async def aclose(self) -> None:
        """Kill every worker and case, and wait until they are gone; idempotent."""
        self._close_all()
        self._loop = None

    def has_room(self) -> bool:
        """Whether a worker is free."""
        return not self._free.locked()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[_Worker]:
        """A healthy worker, put back afterwards unless it was discarded, failed, interrupted or is due for renewal."""
        async with self._free:
            worker = self._idle.popleft() if self._idle else await self._spawn()
            done = False
            try:
                yield worker
                done = True
            finally:
                if not done or worker.zygote.cells >= RECYCLE_AFTER:
                    self.discard(worker)
                if worker in self._all:
                    self._put_back(worker)

    async def _spawn(self) -> _Worker:
        worker = _Worker(Zygote(self._libraries), self.limits.file_mb)
        self._all.add(worker)
        try:
            await worker.zygote.ready()
            await probe_worker(worker, replace(_DEFAULT_LIMITS, file_mb=self.limits.file_mb))
            worker.leave()
            worker.prepare()
        except CellDied:
            self.discard(worker)
            raise SandboxError("a new sandbox worker died in its self-test; is the machine out of memory?") from None
        except BaseException:
            self.discard(worker)
            raise
        self._capabilities = worker.zygote.capabilities
        return worker

    def _put_back(self, worker: _Worker) -> None:
        try:
            worker.leave()
            worker.prepare()
        except SandboxError:  # found dead on its return: what it did before stands
            self.discard(worker)
        else:
            self._idle.append(worker)

    def discard(self, worker: Worker) -> None:
        """Kill a worker and all its cells."""
        assert isinstance(worker, _Worker)
        self._all.discard(worker)
        worker.close()

    def _close_all(self) -> None:
        for worker in self._all:
            worker.zygote.hang_up()
        for worker in self._all:
            worker.close()
        self._all.clear()
        self._idle.clear()


class _Worker:
    """A zygote, the cell in use, and the next ones getting ready."""

    def __init__(self, zygote: Zygote, file_mb: int) -> None:
        self.zygote = zygote
        self.file_mb = file_mb
        self.used: Cell | None = None
        self.ahead: deque[Cell] = deque()

    async def cell(self, limits: SandboxLimits) -> Cell:
        """A fresh cell; one that was made ahead of demand, if it has the right size."""
        self.leave()
        self.prepare()
        while self.ahead and limits.file_mb == self.file_mb:
            self.used = self.ahead.popleft()
            if await self.used.ready():
                return self.used
            self.leave()  # it died while nobody used it
        self.used = self.zygote.new_cell(limits.file_mb)
        if not await self.used.ready():
            raise CellDied("a sandbox cell ended before it was ready")
        return self.used

    def leave(self) -> None:
        """End the cell in use."""
        if self.used is not None:
            self.used.close()
            self.used = None

    def prepare(self) -> None:
        """Have cells made ahead of demand."""
        while len(self.ahead) < AHEAD:
            self.ahead.append(self.zygote.new_cell(self.file_mb))

    def close(self) -> None:
        """Kill everything and wait until it is gone."""
        self.leave()
        while self.ahead:
            self.ahead.pop().close()
        self.zygote.close()


def _location(name: str) -> str:
    """The directory or file of an importable top-level package or module."""
    spec = importlib.util.find_spec(name)
    if spec is None or not (spec.submodule_search_locations or spec.origin):
        raise ConfigError(f"a sandbox cannot offer the library {name!r}: it is not installed here")
    return next(iter(spec.submodule_search_locations or ()), None) or str(spec.origin)


def probe() -> frozenset[str]:
    """Start a jail, run one case, stop it; the capabilities in force. For commands: not from inside an event loop.

    Raises ``SandboxError`` with the remedy where the jail cannot run.
    """

    async def attempt() -> frozenset[str]:
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
            return sandbox.capabilities
        finally:
            await sandbox.aclose()

    return asyncio.run(attempt())
