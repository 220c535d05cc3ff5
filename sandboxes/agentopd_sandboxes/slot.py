"""The judge's end of a zygote and of its cells: start them, send cases, know when one died."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agentopd.contracts import SandboxLimits
from agentopd.errors import SandboxError, boundary
from agentopd_sandboxes import cell, linux, wire
from agentopd_sandboxes.pool import CellDied, CellKilled
from agentopd_sandboxes.protocol import Outcome, pack_limits, ran_out_of_time
from agentopd_sandboxes.remedies import remedy
from agentopd_sandboxes.watch import PATIENCE

START_S = 60.0
GRACE_S = 30.0
"""How much longer than a cell's own deadline the judge waits before it gives the cell up."""
REPLY_BYTES = 64 * 1024
STOP_S = 10.0

PACKAGE = Path(__file__).resolve().parent
# A stand-in package keeps the real one's __init__, and with it everything the judge imports, out of the sandbox.
BOOT = (
    "import sys, types; package = types.ModuleType('agentopd_sandboxes'); package.__path__ = [sys.argv[1]]; "
    "sys.modules[package.__name__] = package; "
)
_ZYGOTE = BOOT + "from agentopd_sandboxes import zygote; zygote.main()"


def interpreter() -> str:
    """The interpreter behind a virtual environment: the one that has the standard library."""
    return getattr(sys, "_base_executable", None) or sys.executable


class Zygote:
    """A running zygote, which makes cells; after any error it is closed and never used again."""

    def __init__(self, libraries: Mapping[str, str] | None = None) -> None:
        self._libraries = json.dumps(libraries or {})
        if linux.MACHINE not in linux.SUPPORTED_MACHINES:
            raise SandboxError(f"the jail sandbox runs on {', '.join(linux.SUPPORTED_MACHINES)}, not {linux.MACHINE}")
        self.cells = 0
        self.capabilities: frozenset[str] = frozenset()
        self._errors = os.memfd_create("errors")
        self._socket, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        with inner, boundary(SandboxError, "starting a sandbox worker"):
            try:
                self._keeper = self._start_keeper(inner)
            except BaseException:
                self._socket.close()
                os.close(self._errors)
                raise

    def _start_keeper(self, inner: socket.socket) -> subprocess.Popen[bytes]:
        arguments = [str(PACKAGE), str(inner.fileno()), str(os.getpid()), self._libraries]
        return subprocess.Popen(
            [interpreter(), "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _ZYGOTE, *arguments],
            stdin=subprocess.PIPE,  # never written to: its end tells the keeper that we are gone
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=(inner.fileno(),),
            env={"PYTHONHASHSEED": "0"},  # the order of a set of strings is the same in every run
            cwd="/",
            start_new_session=True,
        )

    async def ready(self) -> None:
        """Wait until it serves; ``SandboxError`` names what to change if it cannot."""
        try:
            async with asyncio.timeout(START_S):
                hello = await _receive(self._socket)
        except (CellDied, TimeoutError):
            said = os.pread(self._errors, 2000, 0).decode(errors="replace").strip()
            raise SandboxError(f"a sandbox worker did not start: {said or 'no message'}") from None
        self.capabilities = frozenset(_decoded(hello, remedy)["capabilities"])

    def new_cell(self, file_mb: int) -> Cell:
        """Ask for one more cell, for files of at most ``file_mb``; it gets ready while the caller goes on."""
        self.cells += 1
        with boundary(SandboxError, "asking for a sandbox cell"), ExitStack() as stack:
            ours, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(ours.close)
            with inner:
                ours.setblocking(False)
                files = []
                for name in ("request", "report", "output"):
                    files.append(os.memfd_create(name))
                    stack.callback(os.close, files[-1])
                try:
                    socket.send_fds(self._socket, [str(file_mb).encode()], [inner.fileno(), *files])
                except OSError:
                    raise CellDied("a sandbox worker does not answer") from None
            return Cell(ours, files, file_mb, stack.pop_all())

    def hang_up(self) -> None:
        """Tell the keeper to kill everything; returns at once. Idempotent."""
        if self._keeper.stdin and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
            self._socket.close()
            os.close(self._errors)

    def close(self) -> None:
        """Kill everything and wait until it is gone, some milliseconds. Idempotent."""
        self.hang_up()
        try:
            self._keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            self._keeper.wait()


class Cell:
    """The judge's end of one cell, which runs one case."""

    def __init__(self, control: socket.socket, files: list[int], file_mb: int, resources: ExitStack) -> None:
        self.file_mb = file_mb
        self._socket = control
        self._request, self._report, self._output = files
        self._resources = resources

    async def ready(self) -> bool:
        """Wait until it can serve a case; False if it has ended. ``SandboxError`` if it cannot be set up."""
        try:
            async with asyncio.timeout(START_S):
                hello = await _receive(self._socket)
        except CellDied:
            return False
        except TimeoutError:
            raise CellDied(f"a sandbox cell was not ready after {START_S:g} s") from None
        if hello != cell.READY:
            return _decoded(hello, remedy) is None
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True  # it lives: there is neither an end nor word of one
        except OSError:
            pass
        return False

    async def call(self, request: bytes, limits: SandboxLimits) -> Outcome:
        """Run one encoded request.

        Raises ``SandboxError`` if the sandbox could not set it up, ``CellDied`` if it went silent, ``CellKilled`` if
        it was killed: SIGKILL from inside does not reach the first process of a pid namespace, and where that process
        sends it to itself, the filter ends it by another signal.
        """
        with boundary(SandboxError, "running a case"):
            write_all(self._request, request)
            reply = await self._ask(limits)
            outcome = Outcome(
                status=reply.get("status"),
                killed=reply["killed"],
                cpu_s=reply["cpu_s"],
                wall_ms=reply["wall_ms"],
                report=os.pread(self._report, wire.MAX_FRAME_BYTES + 1, 0),
                output=os.pread(self._output, limits.output_bytes + 1, 0),
            )
            if outcome.signal == signal.SIGKILL and not ran_out_of_time(outcome, limits):
                raise CellKilled("a sandbox cell was killed from outside")
            return outcome

    async def _ask(self, limits: SandboxLimits) -> dict[str, Any]:
        try:
            self._socket.send(pack_limits(limits))
            async with asyncio.timeout(limits.wall_s * PATIENCE + GRACE_S):
                message = await _receive(self._socket)
        except OSError as exc:  # a TimeoutError is one
            raise CellDied("a sandbox cell does not answer") from exc
        reply = _decoded(message, lambda fault, _: f"the sandbox could not set up a case: {fault}")
        if "wall_ms" not in reply:
            raise CellKilled("a sandbox cell ended before its case began")
        return reply

    def close(self) -> None:
        """Let the cell and every process in it end; returns at once. Idempotent."""
        self._resources.close()


async def _receive(control: socket.socket) -> bytes:
    try:
        message = await asyncio.get_running_loop().sock_recv(control, REPLY_BYTES)
    except ConnectionError:
        message = b""
    if not message:
        raise CellDied("a sandbox worker ended")
    return message


def _decoded(message: bytes, say: Callable[[str, int | None], str]) -> dict[str, Any]:
    """What a worker says; a fault is a ``SandboxError`` in the words of ``say``."""
    decoded: dict[str, Any] = json.loads(message)
    if "fault" in decoded:
        raise SandboxError(say(decoded["fault"], decoded["errno"]))
    return decoded


def write_all(fd: int, data: bytes) -> None:
    """Write everything."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
