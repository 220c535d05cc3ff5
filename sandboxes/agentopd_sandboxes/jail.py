"""The namespace jail: no daemon, no other program, no root where the kernel allows user namespaces.

Each worker is a zygote (an interpreter already inside its own namespaces) that makes one cell per program: fresh
namespaces, prepared ahead of demand, in which each case is a process of its own. See ``zygote`` for what runs inside,
``cell`` and ``case`` for the locks on a payload, ``namespaces`` for what it can see.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd.errors import SandboxError
from agentopd_sandboxes.protocol import checked, checked_workers, encode_request, new_request_id, to_result
from agentopd_sandboxes.slot import Cell, CellDied, Zygote

RECYCLE_AFTER = 1000
"""Cells after which a zygote is replaced, so that whatever it may have gathered is bounded."""
CASES_PER_LANE = 4
"""A program with more cases than this is spread over several free workers from the start."""
PATIENCE_S = 0.02
"""A program that still has cases after this long gets one more free worker."""

_DEFAULT_LIMITS = SandboxLimits()
_PROBE = (Program("import colorsys"), Case("probe", "1 + 1"))


class JailSandbox:
    """Runs each case in a process of its own, inside Linux namespaces that no other program shares.

    ``workers`` programs run at once (default: one per CPU core), and a program with many cases uses all that are free;
    workers start when first needed. One instance may be shared by all coroutines of a loop, and used again from another
    loop once the first has ended.
    """

    name: ClassVar[str] = "jail"

    def __init__(self, workers: int | None = None, limits: SandboxLimits = _DEFAULT_LIMITS) -> None:
        self.workers = checked_workers(workers)
        self.limits = checked(limits)
        self._idle: list[_Worker] = []
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
            async with self._worker():
                pass

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own fresh, isolated process; results in the order of ``cases``.

        Raises ``SandboxError`` for a fault of the machinery, ``TaskError`` for arguments that are not plain data.
        """
        await self.start()
        run = _Run(self, program, cases, self.limits if limits is None else checked(limits))
        count = max(1, min(self.workers, len(cases) // CASES_PER_LANE))
        lanes = [asyncio.create_task(run.lane()) for _ in range(count)]
        try:
            pending = set(lanes)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=PATIENCE_S, return_when=asyncio.FIRST_EXCEPTION)
                for lane in done:
                    lane.result()
                if run.todo and not self._free.locked():
                    lanes.append(asyncio.create_task(run.lane()))
                    pending.add(lanes[-1])
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
        return run.results()

    async def aclose(self) -> None:
        """Kill every worker and case, and wait until they are gone; idempotent."""
        self._close_all()
        self._loop = None

    @asynccontextmanager
    async def cell(self) -> AsyncIterator[_Worker]:
        """A worker with a cell that no program has used, for one program."""
        async with self._worker() as worker:
            yield worker

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        """A healthy worker, put back afterwards unless it was discarded, failed, interrupted or is due for renewal."""
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._spawn()
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
        worker = _Worker(Zygote(), self.limits.file_mb)
        self._all.add(worker)
        try:
            await worker.zygote.ready()
            program, case = _PROBE
            request_id = new_request_id()
            cell = await worker.cell(self.limits.file_mb)
            outcome = await cell.call(encode_request(request_id, program, case), _DEFAULT_LIMITS)
            result = to_result(case, request_id, outcome, _DEFAULT_LIMITS)
            if result.value != 2:
                raise SandboxError(f"a new sandbox worker failed its self-test: {result.status} {result.detail}")
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

    def discard(self, worker: _Worker) -> None:
        """Kill a worker and all its cells."""
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
    """A zygote, the cell in use, and the next one getting ready."""

    def __init__(self, zygote: Zygote, file_mb: int) -> None:
        self.zygote = zygote
        self.file_mb = file_mb
        self.used: Cell | None = None
        self.next: Cell | None = None

    async def cell(self, file_mb: int) -> Cell:
        """The cell of the current program; a fresh one if there is none that can go on."""
        if self.used is None or not self.used.usable:
            self.leave()
            if self.next is None or self.next.file_mb != file_mb:
                self.used = self.zygote.new_cell(file_mb)
            else:
                self.used, self.next = self.next, None
            await self.used.ready()
        return self.used

    def leave(self) -> None:
        """End the cell in use; the next program gets another."""
        if self.used is not None:
            self.used.close()
            self.used = None

    def prepare(self) -> None:
        """Have a cell made ahead of demand."""
        if self.next is None:
            self.next = self.zygote.new_cell(self.file_mb)

    def close(self) -> None:
        """Kill everything and wait until it is gone."""
        for cell in (self.used, self.next):
            if cell is not None:
                cell.close()
        self.used = self.next = None
        self.zygote.close()


class _Run:
    """One program's cases, shared out among the lanes that run them."""

    def __init__(self, sandbox: JailSandbox, program: Program, cases: Sequence[Case], limits: SandboxLimits) -> None:
        self.sandbox = sandbox
        self.limits = limits
        self.cases = cases
        ids = [new_request_id() for _ in cases]
        self.requests = [(id_, encode_request(id_, program, case)) for id_, case in zip(ids, cases, strict=True)]
        self.todo = deque(range(len(cases)))
        self.deaths = [0] * len(cases)
        self.found: dict[int, CaseResult] = {}

    async def lane(self) -> None:
        """Run cases on one worker until none is left. A worker that dies under one is replaced."""
        while self.todo:
            async with self.sandbox.cell() as worker:
                while self.todo:
                    index = self.todo.popleft()
                    if self.deaths[index] == 2:  # the new worker has just passed its self-test
                        self.found[index] = CaseResult(
                            self.cases[index].id, CaseStatus.CRASH, detail="it killed its sandbox twice"
                        )
                        continue
                    try:
                        await self._one(worker, index)
                    except CellDied:
                        self.deaths[index] += 1
                        self.todo.appendleft(index)
                        self.sandbox.discard(worker)
                        break

    async def _one(self, worker: _Worker, index: int) -> None:
        request_id, request = self.requests[index]
        cell = await worker.cell(self.limits.file_mb)
        outcome = await cell.call(request, self.limits)
        self.found[index] = to_result(self.cases[index], request_id, outcome, self.limits)

    def results(self) -> list[CaseResult]:
        """In the order of the cases."""
        return [self.found[index] for index in range(len(self.cases))]


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
