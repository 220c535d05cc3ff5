"""How the cases of one program are shared out among workers; the same for every backend that runs cells."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd.errors import SandboxError
from agentopd_sandboxes.protocol import Outcome, encode_request, new_request_id, to_result

CASES_PER_LANE = 4
"""A program with more cases than this is spread over several free workers from the start."""
PATIENCE_S = 0.02
"""A program that still has cases after this long gets one more free worker."""
KILLS_BORNE = 3
"""How often a case is run again after a kill that it cannot have sent itself."""
LOSSES_BORNE = 2
"""How many workers, beyond as many as there are, a program may find dead before one of its cases has begun."""
PROBE = (Program("import colorsys"), Case("probe", "1 + 1"))


class CellDied(SandboxError):
    """A worker or a cell ended without a word. Whose fault that was is not known yet."""


class NoCell(CellDied):
    """A worker was found dead before the case began: no case killed it."""


class CellKilled(SandboxError):
    """Somebody outside ended a cell, which the program in it had no means to do."""


class Cell(Protocol):
    """A place for the cases of one program, one at a time."""

    async def call(self, request: bytes, limits: SandboxLimits) -> Outcome:
        """Run one encoded request in a fresh process; ``CellDied``, ``CellKilled`` or another ``SandboxError``."""
        ...


class Worker(Protocol):
    """Whatever hands out cells to one program at a time."""

    async def cell(self, limits: SandboxLimits) -> Cell:
        """The program's cell, or a fresh one where that cannot go on."""
        ...


class Pool(Protocol):
    """A sandbox as ``run_program`` sees it."""

    workers: int

    def lease(self) -> AbstractAsyncContextManager[Worker]:
        """A healthy worker for one program."""
        ...

    def discard(self, worker: Worker) -> None:
        """Get rid of a worker that failed."""
        ...

    def has_room(self) -> bool:
        """Whether a worker is free."""
        ...


async def run_program(pool: Pool, program: Program, cases: Sequence[Case], limits: SandboxLimits) -> list[CaseResult]:
    """Run every case once; results in the order of ``cases``."""
    run = _Run(pool, program, cases, limits)
    count = max(1, min(pool.workers, len(cases) // CASES_PER_LANE))
    lanes = [asyncio.create_task(run.lane()) for _ in range(count)]
    try:
        pending = set(lanes)
        while pending:
            done, pending = await asyncio.wait(pending, timeout=PATIENCE_S, return_when=asyncio.FIRST_EXCEPTION)
            for lane in done:
                lane.result()
            if run.todo and pool.has_room():
                lanes.append(asyncio.create_task(run.lane()))
                pending.add(lanes[-1])
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return run.results()


async def probe(worker: Worker, limits: SandboxLimits) -> None:
    """Run a case whose value is known; ``SandboxError`` if it does not come back."""
    program, case = PROBE
    request_id = new_request_id()
    cell = await worker.cell(limits)
    outcome = await cell.call(encode_request(request_id, program, case), limits)
    result = to_result(case, request_id, outcome, limits)
    if result.value != 2:
        raise SandboxError(f"a new sandbox worker failed its self-test: {result.status} {result.detail}")


class _Run:
    """One program's cases, and what became of them."""

    def __init__(self, pool: Pool, program: Program, cases: Sequence[Case], limits: SandboxLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.cases = cases
        ids = [new_request_id() for _ in cases]
        self.requests = [(id_, encode_request(id_, program, case)) for id_, case in zip(ids, cases, strict=True)]
        self.todo = deque(range(len(cases)))
        self.deaths = [0] * len(cases)
        self.kills = [0] * len(cases)
        self.losses = 0
        self.found: dict[int, CaseResult] = {}

    async def lane(self) -> None:
        """Run cases on one worker until none is left. A worker that dies under one is replaced."""
        while self.todo:
            async with self.pool.lease() as worker:
                while self.todo:
                    index = self.todo.popleft()
                    if self.deaths[index] == 2:  # who did it? the case, if a fresh worker lives on without it
                        await probe(worker, self.limits)
                        detail = "it killed its sandbox twice"
                        self.found[index] = CaseResult(self.cases[index].id, CaseStatus.CRASH, detail=detail)
                        continue
                    try:
                        await self._one(worker, index)
                    except CellDied as death:
                        self._count(index, death)
                        self.todo.appendleft(index)
                        self.pool.discard(worker)
                        break

    def _count(self, index: int, death: CellDied) -> None:
        """Against the case, if it had begun; else against the machinery, which is at fault where this goes on."""
        if not isinstance(death, NoCell):
            self.deaths[index] += 1
            return
        self.losses += 1
        if self.losses > self.pool.workers + LOSSES_BORNE:
            raise SandboxError(f"{self.losses} sandbox workers were dead before a case began: {death}") from death

    async def _one(self, worker: Worker, index: int) -> None:
        request_id, request = self.requests[index]
        try:
            cell = await worker.cell(self.limits)
        except CellDied as exc:
            raise NoCell(str(exc)) from exc
        try:
            outcome = await cell.call(request, self.limits)
        except CellKilled:
            self.kills[index] += 1
            if self.kills[index] > KILLS_BORNE:
                raise
            self.todo.appendleft(index)
            return
        result = to_result(self.cases[index], request_id, outcome, self.limits)
        if result.status is CaseStatus.CRASH and outcome.signal == signal.SIGKILL and not self.deaths[index]:
            self.deaths[index] += 1  # by its own hand, or by a machine that ran out of memory: once more will tell
            self.todo.appendleft(index)
        else:
            self.found[index] = result

    def results(self) -> list[CaseResult]:
        """In the order of the cases."""
        return [self.found[index] for index in range(len(self.cases))]
