"""How cases are shared out: who is to blame for a case that was killed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd.errors import SandboxError
from agentopd_sandboxes import wire
from agentopd_sandboxes.pool import KILLS_BORNE, LOSSES_BORNE, CellDied, CellKilled, Worker, run_program
from agentopd_sandboxes.protocol import Outcome

LIMITS = SandboxLimits()


class KilledCells:
    """A pool of one worker that is dead ``losses`` times; its first ``kills`` cells are killed, the others answer 7."""

    workers = 1

    def __init__(self, kills: int, losses: int = 0) -> None:
        self.kills = kills
        self.losses = losses
        self.calls = 0
        self.discarded = 0

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Worker]:
        yield self

    def discard(self, worker: Worker) -> None:
        self.discarded += 1

    def has_room(self) -> bool:
        return False

    async def cell(self, limits: SandboxLimits) -> "KilledCells":
        if self.discarded < self.losses:
            raise CellDied("a sandbox worker does not answer")
        return self

    async def call(self, request: bytes, limits: SandboxLimits) -> Outcome:
        self.calls += 1
        if self.calls <= self.kills:
            raise CellKilled("a sandbox cell was killed from outside")
        id_ = wire.decode(request)["id"]
        return Outcome(0, "", 0.01, 1.0, wire.pack_frame(id_, wire.VALUE, wire.encode(7)), b"")


def run(pool: KilledCells) -> CaseResult:
    (result,) = asyncio.run(run_program(pool, Program(""), [Case("c", "7")], LIMITS))
    return result


@pytest.mark.parametrize("kills", [0, 1, KILLS_BORNE])
def test_a_case_killed_from_outside_is_run_again_by_the_same_worker(kills: int) -> None:
    pool = KilledCells(kills)
    result = run(pool)
    assert (result.status, result.value) == (CaseStatus.VALUE, 7)
    assert (pool.calls, pool.discarded) == (kills + 1, 0)


def test_a_case_killed_from_outside_is_never_scored() -> None:
    pool = KilledCells(KILLS_BORNE + 1)
    with pytest.raises(SandboxError, match="killed from outside"):
        run(pool)
    assert pool.calls == KILLS_BORNE + 1


@pytest.mark.parametrize("losses", [2, KilledCells.workers + LOSSES_BORNE])
def test_a_worker_that_was_dead_before_the_case_counts_against_nobody(losses: int) -> None:
    pool = KilledCells(0, losses)
    result = run(pool)
    assert (result.status, result.value) == (CaseStatus.VALUE, 7)
    assert (pool.calls, pool.discarded) == (1, losses)


def test_workers_that_are_always_dead_are_a_fault() -> None:
    pool = KilledCells(0, 1000)
    with pytest.raises(SandboxError, match="dead before a case began"):
        run(pool)
    assert (pool.calls, pool.discarded) == (0, KilledCells.workers + LOSSES_BORNE)
