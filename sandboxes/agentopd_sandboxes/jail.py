"""The namespace jail: no daemon, no other program, no root where the kernel allows user namespaces.

Each worker is a zygote (an interpreter already inside its own namespaces) that forks every case into fresh ones. See
``zygote`` for what runs inside, ``case`` for the locks on a payload, and ``namespaces`` for what it can see.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd.errors import SandboxError, UserError
from agentopd_sandboxes.protocol import encode_request, new_request_id, to_result
from agentopd_sandboxes.slot import Zygote, ZygoteDied

RECYCLE_AFTER = 300
"""Runs after which a zygote is replaced, so that whatever it may have gathered is bounded."""

_DEFAULT_LIMITS = SandboxLimits()
_PROBE = (Program("import colorsys"), Case("probe", "1 + 1"))


class JailSandbox:
    """Runs each case in a process of its own, inside fresh Linux namespaces.

    ``workers`` cases run at once (default: one per CPU core); workers start when first needed. One instance may be
    shared by all coroutines of a loop, and used again from another loop once the first has ended.
    """

    name: ClassVar[str] = "jail"

    def __init__(self, workers: int | None = None, limits: SandboxLimits = _DEFAULT_LIMITS) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"a sandbox needs at least one worker, not {workers}")
        self.workers = workers or os.cpu_count() or 1
        self.limits = _checked(limits)
        self._idle: list[Zygote] = []
        self._all: set[Zygote] = set()
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
            async with self._worker():
                pass

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own fresh, isolated process; results in the order of ``cases``.

        Raises ``SandboxError`` for a fault of the machinery, ``TaskError`` for arguments that are not plain data.
        """
        await self.start()
        bounds = self.limits if limits is None else _checked(limits)
        tasks = [asyncio.create_task(self._run(program, case, bounds)) for case in cases]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        """Kill every worker and case, and wait until they are gone; idempotent."""
        self._close_all()
        self._loop = None

    async def _run(self, program: Program, case: Case, limits: SandboxLimits) -> CaseResult:
        """One case. A worker that dies under it is replaced and probed; only if it dies again is the case to blame."""
        request_id = new_request_id()
        request = encode_request(request_id, program, case)
        for _ in range(2):
            async with self._worker() as worker:
                try:
                    outcome = await worker.call(request, limits)
                except ZygoteDied:
                    self._discard(worker)
                    continue
            return to_result(case, request_id, outcome, limits)
        async with self._worker():
            return CaseResult(case.id, CaseStatus.CRASH, detail="it killed its sandbox twice")

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[Zygote]:
        """A healthy worker, put back afterwards unless it was discarded, failed, interrupted or is due for renewal."""
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._spawn()
            done = False
            try:
                yield worker
                done = True
            finally:
                if not done or worker.runs >= RECYCLE_AFTER:
                    self._discard(worker)
                if worker in self._all:
                    self._idle.append(worker)

    async def _spawn(self) -> Zygote:
        worker = Zygote()
        self._all.add(worker)
        try:
            await worker.ready()
            program, case = _PROBE
            request_id = new_request_id()
            outcome = await worker.call(encode_request(request_id, program, case), _DEFAULT_LIMITS)
            result = to_result(case, request_id, outcome, _DEFAULT_LIMITS)
            if result.value != 2:
                raise SandboxError(f"a new sandbox worker failed its self-test: {result.status} {result.detail}")
        except ZygoteDied:
            self._discard(worker)
            raise SandboxError("a new sandbox worker died in its self-test; is the machine out of memory?") from None
        except BaseException:
            self._discard(worker)
            raise
        self._capabilities = worker.capabilities
        return worker

    def _discard(self, worker: Zygote) -> None:
        self._all.discard(worker)
        worker.close()

    def _close_all(self) -> None:
        for worker in self._all:
            worker.hang_up()
        for worker in self._all:
            worker.close()
        self._all.clear()
        self._idle.clear()


def _checked(limits: SandboxLimits) -> SandboxLimits:
    for name in ("wall_s", "cpu_s", "memory_mb", "processes", "output_bytes", "file_mb"):
        if getattr(limits, name) <= 0:
            raise UserError(f"sandbox limit {name} is {getattr(limits, name)}; give a positive number")
    return limits


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
