"""The trusted half inside a container: runs one program's cases and talks to the judge over standard input and output.

Each case is forked into a process of its own and starts in empty directories; nothing of it survives into the next, or
the container is not used again. The filter keeps its signals from the agent, which holds clock and scales beside it.

A request is a length, packed bounds, and as many bytes of request; a reply is three lengths and as many bytes of how it
ended (JSON), report and output. Imports only the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import sys
import time
from typing import Any, NamedTuple, NoReturn

from agentopd_sandboxes import case, landlock, linux, preload, seccomp, wire
from agentopd_sandboxes.bounds import SIZE, Bounds
from agentopd_sandboxes.confine import Tools, lock_down, lower_limits
from agentopd_sandboxes.scales import Scales
from agentopd_sandboxes.watch import Watch

REQUEST, REPLY = struct.Struct(">I"), struct.Struct(">III")
HELLO = b"agentopd"
IN_FD, OUT_FD = 61, 62
SETUP_S = 20.0
WRITABLE = ("/work", "/tmp", "/dev/shm")
_READABLE = ("/usr", "/lib", "/lib64", "/opt", "/etc")


def main() -> NoReturn:
    """Entry point of the container: lock down, say what is in force, serve until standard input ends."""
    preload.preload(preload.COMMON)  # the rest can be imported here, and only one program would gain
    case.rehearse()
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    readable = [path for path in {*sys.path, *_READABLE} if os.path.isdir(path)]
    ruleset = landlock.build_ruleset(*WRITABLE, readable=readable)
    guarded = (1, os.getpid())
    tools = Tools(proc, ruleset, seccomp.build_filter(linux.MACHINE, guarded))
    files = [os.memfd_create(name) for name in ("request", "report", "output")]
    _arrange_descriptors()
    for number in (signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    lower_limits()
    lock_down(tools)
    preload.tidy_interpreter({"HOME": case.WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8"})
    preload.freeze()
    hello = ["no_new_privs", "rlimits", "seccomp"] + ["landlock"] * (ruleset is not None)
    hello += ["memory_total"] * Scales(proc).sees_children()
    _write(HELLO + REPLY.pack(len(json.dumps(hello)), 0, 0) + json.dumps(hello).encode())
    _serve(_Cases(tools, files))


def _arrange_descriptors() -> None:
    """Keep the judge's two streams where a case closes them, and leave it empty standard ones."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(0, IN_FD, inheritable=False)
    os.dup2(1, OUT_FD, inheritable=False)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _serve(cases: _Cases) -> NoReturn:
    files = cases.files
    while True:
        (size,) = REQUEST.unpack(_read(REQUEST.size))
        bounds = Bounds.unpack(_read(SIZE))
        for file in files:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        while size:
            chunk = _read(min(size, 1 << 20))
            os.write(files[0], chunk)
            size -= len(chunk)
        reply = cases.run(bounds)
        if not reply.get("last") and not cases.emptied():
            reply["last"] = True
        ended = json.dumps(reply).encode()
        report = os.pread(files[1], wire.MAX_FRAME_BYTES + 1, 0)
        output = os.pread(files[2], bounds.output_bytes + 1, 0)
        _write(REPLY.pack(len(ended), len(report), len(output)) + ended + report + output)


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = os.read(IN_FD, size - len(data))
        if not chunk:
            os._exit(0)
        data += chunk
    return data


def _write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(OUT_FD, left) :]


class _Cases:
    """Runs cases one at a time on three files: request, report, output."""

    def __init__(self, tools: Tools, files: list[int]) -> None:
        self.ruleset = tools.ruleset
        self.proc = tools.proc
        self.files = files
        self.scales = Scales(tools.proc)
        self.waiting: _Waiting | None = self.fork()
        """The first case's process, forked ahead of demand: there is no program yet that could reach it."""

    def fork(self) -> _Waiting:
        """Fork a case's process, which waits for its limits at the other end of a pipe."""
        (orders, order), (status, say) = (os.pipe2(os.O_CLOEXEC) for _ in range(2))
        pid = linux.fork()
        if pid == 0:
            os.close(order)
            case.wait(self.files, orders, say, self.ruleset)
        os.close(orders)
        os.close(say)
        return _Waiting(pid, os.pidfd_open(pid), order, status)

    def run(self, bounds: Bounds) -> dict[str, Any]:
        """Run the case of the request file; how it ended.

        ``last`` in the reply means that no other case can run here, nor can one unless this one's files are then
        ``emptied``.
        """
        waiting = self.waiting or self.fork()
        self.waiting = None
        try:
            os.write(waiting.order, bounds.pack())
            if fault := _set_up(waiting):
                self.clear(waiting.pid)
                return {"fault": fault, "last": True}
            return self.watch(waiting.pid, waiting.ending, bounds)
        finally:
            for fd in waiting[1:]:
                os.close(fd)

    def watch(self, pid: int, ending: int, bounds: Bounds) -> dict[str, Any]:
        """Wait until a case ends, or has to be killed."""
        watch = Watch(self.scales, pid, bounds, time.monotonic())
        poller = select.poll()
        poller.register(ending, select.POLLIN)
        poller.register(IN_FD, select.POLLIN)
        while True:
            for fd, _ in poller.poll(watch.left_s() * 1000 + 1):
                if fd == IN_FD:
                    os._exit(0)  # nobody waits for the answer: everything goes with us
                return {**self.outlive(pid), "wall_ms": watch.wall_ms()}
            if why := watch.look():
                self.clear(pid)
                return {"killed": why, "last": True, "wall_ms": watch.wall_ms()}

    def outlive(self, pid: int) -> dict[str, Any]:
        """Collect a case's process that has ended; if it left others running, they go with the container."""
        _, status, usage = os.wait4(pid, 0)
        ended = {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime}
        left = {int(name) for name in os.listdir(self.proc) if name.isdigit()} - {1, os.getpid()}
        return {**ended, "last": True} if left else ended

    def clear(self, pid: int) -> None:
        """Kill a case's process and wait for it; what it left running goes with the container."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def emptied(self) -> bool:
        """Leave the next case nothing of this one's files; False if that does not work, whatever the reason."""
        try:
            for directory in WRITABLE:
                _empty(directory)
            for directory in WRITABLE[:2]:
                os.chmod(directory, 0o700)
            return not any(map(os.listxattr, WRITABLE))
        except (OSError, RecursionError):
            return False


class _Waiting(NamedTuple):
    """A case's process before its case begins."""

    pid: int
    ending: int
    order: int
    status: int


def _set_up(waiting: _Waiting) -> str:
    """Wait until a case has put on its limits; a fault, or empty."""
    poller = select.poll()
    for fd in (waiting.status, waiting.ending, IN_FD):
        poller.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(SETUP_S * 1000)}
    if IN_FD in ready:
        os._exit(0)
    if not ready:
        return f"a case was not ready after {SETUP_S:.0f} s"
    said = os.read(waiting.status, 4096) if waiting.status in ready else b""
    if said == case.READY:
        return ""
    return said.decode(errors="replace") or "a case ended before it began"


def _empty(directory: str) -> None:
    import shutil  # drags in compression, which an agent seldom needs

    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
