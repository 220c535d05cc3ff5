"""One program's cell: its cases run in it one after the other, each in a process and an empty directory of its own.

The cell's own process puts on every lock that does not depend on a case's limits, once, before any case; then it forks
the cases and keeps clock and scales beside them. It handles only descriptors and limits. In the jail it is the first
process of fresh namespaces, which nothing inside can signal; in a container the filter keeps signals from it. Nothing
of a case survives into the next, or the cell ends; a cell never serves a second program. Imports only the standard
library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from agentopd_sandboxes import case, linux, namespaces
from agentopd_sandboxes.scales import Scales

TICK_S = 0.05
"""How often memory is looked at, and so how coarse that limit is."""
SETUP_S = 20.0
PATIENCE = 3.0
"""The wall clock stands still while a case waits for a processor, until this many times its limit are over."""
OPEN_FILES = 64
STACK_BYTES = 8 << 20


class Tools(NamedTuple):
    """What a cell is given by whoever makes it."""

    proc: int
    """Descriptor of the ``/proc`` in which the cell's processes can be seen."""
    ruleset: int | None
    """A Landlock ruleset."""
    filter: bytes
    """A system-call filter."""
    own_users: bool = True
    """Whether the user namespace is the cell's own, so that its processes can be counted by uid."""


def init(tools: Tools, control: int, file_mb: int) -> NoReturn:
    """Be the first process of fresh namespaces: prepare, then serve the judge at the other end of ``control``."""
    judge = socket.socket(fileno=control)
    try:
        os.setsid()
        namespaces.write_maps(tools.proc, namespaces.NOBODY, namespaces.NOBODY)
        namespaces.mount_case_directory(file_mb)
        lock_down(tools)
        cell = Cell(tools, control, (namespaces.CASE_DIR,), namespaces.restore_case_directory)
        usable = True
        while usable:
            judge.send(b'{"ready": true}')
            message, fds, _, _ = socket.recv_fds(judge, case.MESSAGE_BYTES, 3)
            if not message:
                break
            reply = cell.run(json.loads(message), fds)
            judge.send(json.dumps(reply).encode())
            usable = not reply.get("last") and cell.emptied()
    except BaseException as exc:
        number = exc.errno if isinstance(exc, OSError) else None
        judge.send(json.dumps({"fault": f"{type(exc).__name__}: {exc}", "errno": number, "last": True}).encode())
    finally:
        os._exit(0)


def lock_down(tools: Tools) -> None:
    """Put on what every case of this cell inherits."""
    linux.make_dumpable(False)
    for kind, most in (
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        case.lower(kind, most)
    linux.no_new_privileges()
    linux.drop_capabilities()
    linux.install_filter(tools.filter)


class Cell:
    """Runs cases one at a time; ``hangup`` is a descriptor that is readable once nobody waits for the answer."""

    def __init__(
        self, tools: Tools, hangup: int, directories: tuple[str, ...], restore: Callable[[], None] = lambda: None
    ) -> None:
        self.tools = tools
        self.restore = restore
        self.scales = Scales(tools.proc)
        self.hangup = hangup
        self.directories = directories
        self.waiting: tuple[int, socket.socket] | None = self.fork()
        """The first case's process, forked ahead of demand: there is no program yet that could reach it."""

    def run(self, limits: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Run one case on three files (request, report, output), which are closed; how it ended.

        ``last`` in the reply means that the cell cannot be used again, nor can it unless it is then ``emptied``.
        """
        pid, channel = self.waiting or self.fork()
        self.waiting = None
        with channel:
            socket.send_fds(channel, [json.dumps(limits).encode()], fds)
            for fd in fds:
                os.close(fd)
            return _Watch(self, pid, channel.fileno(), limits).run()

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a case's process, which waits for its files at the other end of the socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = linux.fork()
        if pid == 0:
            case.wait(theirs, self.tools.ruleset, self.tools.own_users)
        theirs.close()
        return pid, ours

    def outlive(self, pid: int) -> dict[str, Any]:
        """Collect a case's process that has ended, and kill whatever it left running."""
        _, status, usage = os.wait4(pid, 0)
        ended = {"status": status, "cpu_s": usage.ru_utime + usage.ru_stime}
        with contextlib.suppress(ChildProcessError):
            while True:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    self.clear(pid)
                    return {**ended, "last": True}
        return ended

    def clear(self, pid: int) -> None:
        """Kill a case's process and every other process of the cell, and wait until they are gone.

        In a container the filter refuses signals to all: there the rest goes with the container.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        try:
            os.kill(-1, signal.SIGKILL)
            while True:
                os.wait()
        except (ProcessLookupError, ChildProcessError, PermissionError):
            return

    def emptied(self) -> bool:
        """Leave the next case nothing of this one's files; False if that does not work, whatever the reason."""
        try:
            for directory in self.directories:
                _empty(directory)
            self.restore()
            return not any(map(os.listxattr, self.directories))
        except (OSError, RecursionError):
            return False


def _empty(directory: str) -> None:
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


class _Watch:
    """The clock and the scales beside one running case."""

    def __init__(self, cell: Cell, pid: int, status: int, limits: dict[str, Any]) -> None:
        self.cell = cell
        self.pid = pid
        self.status = status
        self.ending = os.pidfd_open(pid)
        self.memory_bytes = limits["memory_mb"] << 20
        self.wall_s = limits["wall_s"]
        self.started: float | None = None
        self.deadline = time.monotonic() + SETUP_S
        self.weighing = math.inf

    def run(self) -> dict[str, Any]:
        """Watch until the case's process ends, or has to be killed."""
        poller = select.poll()
        for fd in (self.status, self.ending, self.cell.hangup):
            poller.register(fd, select.POLLIN)
        try:
            while True:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    if self.extend():
                        continue
                    return self.kill("wall")
                ready = {fd for fd, _ in poller.poll(min(left, TICK_S) * 1000 + 1)}
                if self.cell.hangup in ready:
                    os._exit(0)  # nobody waits for the answer: everything goes with us
                if self.status in ready:
                    poller.unregister(self.status)
                    fault = self.hear()
                    if fault:
                        self.cell.clear(self.pid)
                        return {"fault": fault, "last": True}
                if self.ending in ready:
                    return self.reply(**self.cell.outlive(self.pid))
                if time.monotonic() >= self.weighing:
                    if self.cell.scales.weigh() > self.memory_bytes:
                        return self.kill("memory")
                    self.weighing = time.monotonic() + TICK_S
        finally:
            os.close(self.ending)

    def hear(self) -> str:
        """Read what the case's own set-up says; a fault, or empty."""
        said = os.read(self.status, 4096)
        if said != case.READY:
            return said.decode(errors="replace") or "a case ended before it began"
        self.started = time.monotonic()
        self.deadline = self.started + self.wall_s
        self.weighing = self.started + TICK_S
        return ""

    def extend(self) -> bool:
        """Move the deadline by the time the case spent waiting for a processor; False if there is no such time."""
        if self.started is None:
            return False
        owed = min(self.cell.scales.waited_s(), (PATIENCE - 1) * self.wall_s)
        self.deadline = self.started + self.wall_s + owed
        return self.deadline > time.monotonic()

    def kill(self, why: str) -> dict[str, Any]:
        """Kill every process of the cell; returns once they are gone."""
        self.cell.clear(self.pid)
        if self.started is None:
            return {"fault": f"a case was not ready after {SETUP_S:.0f} s", "last": True}
        return self.reply(killed=why, last=True)

    def reply(self, **report: Any) -> dict[str, Any]:
        """The report with the time the payload had."""
        elapsed = 0.0 if self.started is None else time.monotonic() - self.started
        return {**report, "wall_ms": elapsed * 1000}
