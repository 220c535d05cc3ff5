"""What the judge sends into a sandbox and how it reads what comes back; the same for every backend."""

from __future__ import annotations

import os
import secrets
import signal
from dataclasses import asdict, dataclass
from typing import Any

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, SandboxLimits
from agentopd.errors import TaskError, UserError
from agentopd.types import encodable
from agentopd_sandboxes import wire
from agentopd_sandboxes.bounds import Bounds

LARGEST = 1 << 40
"""No limit is as large as this."""


@dataclass(frozen=True)
class Outcome:
    """How one run ended, as the zygote saw it, and what the case left in its two files."""

    status: int | None
    """Wait status of the payload; None if it was killed from outside."""
    killed: str
    """``wall``, ``memory``, or empty."""
    cpu_s: float
    wall_ms: float
    report: bytes
    output: bytes

    @property
    def signal(self) -> int | None:
        """The signal that ended it, if one did."""
        return os.WTERMSIG(self.status) if self.status is not None and os.WIFSIGNALED(self.status) else None


def checked(limits: SandboxLimits) -> SandboxLimits:
    """The limits, if each is positive and not absurd; ``UserError`` otherwise."""
    for name, value in asdict(limits).items():
        if not 0 < value < LARGEST:
            raise UserError(f"sandbox limit {name} is {value}; give a positive number below {LARGEST}")
    return limits


def pack_limits(limits: SandboxLimits) -> bytes:
    """As they travel inside."""
    return Bounds(**asdict(limits)).pack()


def checked_workers(workers: int | None) -> int:
    """How many cases run at once; None is one per processor."""
    if workers is not None and workers < 1:
        raise UserError(f"a sandbox needs at least one worker, not {workers}")
    return workers or os.cpu_count() or 1


def new_request_id() -> bytes:
    """The number a case must quote in its report."""
    return secrets.token_bytes(wire.ID_BYTES)


def encode_request(request_id: bytes, program: Program, case: Case) -> bytes:
    """What the case's process reads; ``TaskError`` if a file's name or the arguments cannot travel."""
    for name in program.files:
        if name.startswith("/") or ".." in name.split("/") or not name or "\0" in name:
            raise TaskError(f"support file {name!r}: give a relative path inside the program's directory")
    request = {
        "id": request_id,
        "source": program.source,
        "files": dict(program.files),
        "setup": case.setup,
        "expression": case.expression,
        "args": case.args,
    }
    try:
        return wire.encode(request, wire.MAX_REQUEST_BYTES, wire.MAX_REQUEST_NODES)
    except wire.WireError as exc:
        raise TaskError(f"case {case.id!r} cannot be sent to a sandbox: {exc}") from exc


_STATUS_OF_KIND = {
    wire.EXCEPTION: CaseStatus.EXCEPTION,
    wire.RESOURCE: CaseStatus.RESOURCE,
    wire.BAD_TYPE: CaseStatus.PROTOCOL,
}


def to_result(case: Case, request_id: bytes, outcome: Outcome, limits: SandboxLimits) -> CaseResult:
    """Classify one outcome. Whatever the case did, this returns a result and never raises."""
    status, value, detail = _classify(request_id, outcome, limits)
    stdout = outcome.output[: limits.output_bytes].decode("utf-8", "replace")
    if len(outcome.output) > limits.output_bytes:
        stdout += f"\n[output cut at {limits.output_bytes} bytes]"
    return CaseResult(case.id, status, value, detail, stdout, outcome.wall_ms)


def _classify(request_id: bytes, outcome: Outcome, limits: SandboxLimits) -> tuple[CaseStatus, Any, str]:
    if outcome.killed == "wall":
        return CaseStatus.TIMEOUT, None, f"still running after {limits.wall_s:g} s"
    if outcome.killed == "memory" or outcome.status is None:
        return CaseStatus.RESOURCE, None, f"its processes together used more than {limits.memory_mb} MiB"
    if ran_out_of_time(outcome, limits):
        return CaseStatus.TIMEOUT, None, f"used more than {limits.cpu_s:g} s of CPU"
    if outcome.signal is not None:
        return CaseStatus.CRASH, None, f"killed by {signal.Signals(outcome.signal).name}"
    if not outcome.report:
        code = os.waitstatus_to_exitcode(outcome.status)
        return CaseStatus.NO_RESULT, None, f"it ended (exit code {code}) without reporting a value"
    if outcome.status != 0:
        return CaseStatus.PROTOCOL, None, "it reported and then failed"
    try:
        kind, body = wire.unpack_frame(outcome.report, request_id)
        value = wire.decode(body)
    except wire.WireError as exc:
        return CaseStatus.PROTOCOL, None, f"malformed report: {exc}"
    if kind == wire.VALUE:
        return CaseStatus.VALUE, value, ""
    if kind not in _STATUS_OF_KIND or type(value) is not str:
        return CaseStatus.PROTOCOL, None, "malformed report: unknown kind"
    return _STATUS_OF_KIND[kind], None, encodable(value)


def ran_out_of_time(outcome: Outcome, limits: SandboxLimits) -> bool:
    """Whether the kernel ended it for the CPU time it used."""
    return outcome.signal in (signal.SIGXCPU, signal.SIGKILL) and outcome.cpu_s >= limits.cpu_s * 0.9
