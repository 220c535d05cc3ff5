"""Runs the catalogue against a sandbox, and looks whether the host was touched."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, Sandbox, SandboxLimits
from agentopd.errors import InfraError
from agentopd.testing.catalogue import CATALOGUE, Row

LIMITS = SandboxLimits(wall_s=8.0, cpu_s=8.0, memory_mb=128, processes=16, file_mb=2)
BRIEF = SandboxLimits(wall_s=0.4, cpu_s=1.0, memory_mb=128, processes=16, file_mb=2)
SETTLE_S = 10.0
_ENGINE_MOUNTS = ("overlay", "nsfs")
"""Kinds that a container engine, ours or another's, may mount at any time."""
_WRITTEN = ("m", "d", "0")
"""What rows write into a sandbox's /tmp, by name: it must not turn up in the host's."""


@dataclass(frozen=True)
class Finding:
    """How one row ended."""

    id: str
    title: str
    expected: str
    """What the row asks for: ``1``, or ``0`` and the statuses it may have."""
    outcome: float | None
    """None if the machinery failed."""
    status: str
    ok: bool
    detail: str = ""


async def check_sandbox(
    sandbox: Sandbox, rows: Sequence[Row] = CATALOGUE, advance: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Run every row, an honest program after each hostile one, and at the end look at the host.

    The sandbox is started if needed and stays open. Raises ``SandboxError`` only if it cannot start.
    """
    await sandbox.start()
    findings = []
    with _bait() as bait:
        before = _Host(bait)
        for row in rows:
            findings.append(await _one(sandbox, row, bait))
            advance()
        findings.append(await _host(before, bait))
    return findings


async def _one(sandbox: Sandbox, row: Row, bait: _Bait) -> Finding:
    expected = expectation(row)
    number, canary = random.SystemRandom().randrange(10**6, 10**9), f"x{secrets.token_hex(8)}"
    program = Program(f"HOST = {bait.facts!r}\n{row.source}", row.files)
    cases = [
        Case("hidden", "f(*args)", args=(number,)),
        Case("canary", canary),
        Case("again", "f(*args)", args=(number + 1,)),
    ]
    try:
        results = await sandbox.run_cases(program, cases, BRIEF if row.brief else LIMITS)
        after = await sandbox.run_cases(Program(""), [Case("next", "6 * 7")], LIMITS)
    except InfraError as exc:
        return Finding(row.id, row.title, expected, None, "infra_error", False, str(exc))
    return _judge(row, expected, results, number, after[0])


def _judge(row: Row, expected: str, results: list[CaseResult], number: int, after: CaseResult) -> Finding:
    if [result.id for result in results] != ["hidden", "canary", "again"]:
        return Finding(row.id, row.title, expected, None, "infra_error", False, "not every case was answered once")
    hidden, canary, again = results
    right = all(
        result.status is CaseStatus.VALUE and type(result.value) is int and result.value == 3 * n + 1
        for result, n in ((hidden, number), (again, number + 1))
    )
    tampered = canary.status is CaseStatus.VALUE
    outcome = float(right and not tampered)
    status = "ok" if outcome else "tampered" if tampered else _verdict(hidden.status)
    fits = tampered or hidden.status in row.statuses
    ok = outcome == float(row.honest) and fits and after.value == 42
    detail = "" if ok else f"{hidden.status}: {hidden.detail or hidden.value!r}; next: {after.status}"
    return Finding(row.id, row.title, expected, outcome, status, ok, detail)


def expectation(row: Row) -> str:
    """The outcome a row asks for, and the statuses that a verdict on it may have."""
    return "1" if row.honest else f"0 ({', '.join(sorted({_verdict(status) for status in row.statuses}))})"


def _verdict(status: CaseStatus) -> str:
    """The status of a verdict that fails on a case that ended so."""
    same = (CaseStatus.TIMEOUT, CaseStatus.RESOURCE, CaseStatus.CRASH)
    return str(status) if status in same else "wrong"


# --- the host --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bait:
    """Things of the host that must stay out of reach, and whether somebody came."""

    facts: dict[str, Any]
    listeners: tuple[socket.socket, ...]
    file: Path
    token: str
    temporary: Path
    """Where this process makes temporary files while the suite runs, so that those of others do not count."""

    def touched(self) -> str:
        """What was reached, or empty."""
        for listener in self.listeners:
            try:
                listener.accept()[0].close()
                return f"somebody connected to {listener.getsockname()}"
            except BlockingIOError:
                continue
        return "" if self.file.read_text() == self.token else "a file of the host was changed"


@contextmanager
def _bait() -> Iterator[_Bait]:
    token, variable = secrets.token_hex(16), f"AGENTOPD_BAIT_{secrets.token_hex(4)}"
    with (
        tempfile.TemporaryDirectory(prefix="agentopd-bait-") as folder,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        name = f"\0agentopd-{secrets.token_hex(8)}"
        abstract.bind(name)
        abstract.listen()
        file = Path(folder, "hidden-answers")
        file.write_text(token)
        os.environ[variable] = token
        for listener in (tcp, abstract):
            listener.setblocking(False)
        facts = {
            "file": str(file),
            "port": tcp.getsockname()[1],
            "socket": name,
            "variable": variable,
            "secret": variable,
            "pid": str(os.getpid()),
        }
        usual, tempfile.tempdir = tempfile.tempdir, tempfile.mkdtemp(dir=folder)
        try:
            yield _Bait(facts, (tcp, abstract), file, token, Path(tempfile.tempdir))
        finally:
            tempfile.tempdir = usual
            del os.environ[variable]


class _Host:
    """Mounts, temporary files, host name and running programs of sandboxes, to be compared later."""

    def __init__(self, bait: _Bait) -> None:
        mounts = (line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines())
        self.mounts = sorted(path for path, kind in mounts if kind not in _ENGINE_MOUNTS and "/containers/" not in path)
        self.temporary = os.listdir(bait.temporary), [name for name in _WRITTEN if Path("/tmp", name).exists()]
        self.name = socket.gethostname()


async def _host(before: _Host, bait: _Bait) -> Finding:
    detail = bait.touched()
    async for after in _looks(bait):
        changes = [name for name in ("mounts", "temporary", "name") if getattr(before, name) != getattr(after, name)]
        if not changes:
            break
    else:
        detail = detail or f"changed: {', '.join(changes)}"
    return Finding(
        "host", "the host afterwards", "unchanged", None, "changed" if detail else "unchanged", not detail, detail
    )


async def _looks(bait: _Bait) -> AsyncIterator[_Host]:
    """Look again for a while: what is being taken down may still be there."""
    for _ in range(int(SETTLE_S * 10)):
        yield _Host(bait)
        await asyncio.sleep(0.1)
