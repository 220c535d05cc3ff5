"""No sandbox: each case is an ordinary process of the judge's own user, with limits and nothing else.

For code you wrote yourself, on a machine where nothing else starts. Only ever used by name, and its name is in the
provenance of every verdict that used it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import ClassVar

from agentopd.contracts import Case, CaseResult, Program, SandboxLimits
from agentopd.errors import SandboxError, boundary
from agentopd_sandboxes import case as inner
from agentopd_sandboxes import wire
from agentopd_sandboxes.protocol import (
    Outcome,
    checked,
    checked_workers,
    encode_request,
    new_request_id,
    pack_limits,
    to_result,
)
from agentopd_sandboxes.slot import BOOT, PACKAGE, interpreter, write_all

_MAIN = BOOT + (
    "from agentopd_sandboxes import bounds, case; case.settle(sys.argv[2]); "
    "case.main(bounds.Bounds.unpack(bytes.fromhex(sys.argv[3])), [int(fd) for fd in sys.argv[4:]], None)"
)


class UnsafeSandbox:
    """Runs each case in a process of its own and isolates nothing: it can read, write, kill and connect."""

    name: ClassVar[str] = "unsafe"

    def __init__(self, workers: int | None = None, limits: SandboxLimits | None = None) -> None:
        self.limits = checked(limits or SandboxLimits())
        self.workers = checked_workers(workers)
        self._free: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """Limits on one process, and no isolation."""
        return frozenset({"unsafe"})

    async def start(self) -> None:
        """Nothing to prepare."""

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """Run every case in its own process; results in the order of ``cases``."""
        loop = asyncio.get_running_loop()
        free = self._free.setdefault(loop, asyncio.Semaphore(self.workers))
        bounds = self.limits if limits is None else checked(limits)

        async def one(case: Case) -> CaseResult:
            request_id = new_request_id()
            request = encode_request(request_id, program, case)
            async with free:
                with boundary(SandboxError, "running a case"):
                    return to_result(case, request_id, await _run(request, bounds), bounds)

        return list(await asyncio.gather(*map(one, cases)))

    async def aclose(self) -> None:
        """Forget the loops it was used from."""
        self._free.clear()


async def _run(request: bytes, limits: SandboxLimits) -> Outcome:
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="agentopd-unsafe-") as folder:
        files = [os.memfd_create(name) for name in ("request", "report", "output", "status")]
        for file in files:
            stack.callback(os.close, file)
        write_all(files[0], request)
        arguments = [str(PACKAGE), folder, pack_limits(limits).hex(), *map(str, files)]
        process = await asyncio.create_subprocess_exec(
            interpreter(), "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _MAIN, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            pass_fds=files, env={"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        started, killed = time.monotonic(), ""
        try:
            await asyncio.wait_for(process.wait(), limits.wall_s)
        except TimeoutError:
            killed = "wall"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it made itself the leader of a session
            with suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
        if (said := os.pread(files[3], 4096, 0)) != inner.READY:
            raise SandboxError(
                f"the sandbox could not set up a case: {said.decode(errors='replace') or 'it did not say'}"
            )
        return Outcome(
            status=None if killed else code << 8 if code >= 0 else -code,
            killed=killed,
            cpu_s=0.0,
            wall_ms=(time.monotonic() - started) * 1000,
            report=os.pread(files[1], wire.MAX_FRAME_BYTES + 1, 0),
            output=os.pread(files[2], limits.output_bytes + 1, 0),
        )
