"""The trusted half that lives inside: a keeper outside the pid namespace, and the zygote that is its first process.

The zygote forks one small init per case, inside fresh namespaces, and watches its clock and memory. It handles only
descriptors and limits: programs, arguments and values pass through files that the case opens itself, so nothing of one
run can be found in the memory of the next.

Started by ``slot.Zygote`` in a fresh interpreter; imports only the standard library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from agentopd_sandboxes import case, landlock, linux, namespaces, seccomp

MESSAGE_BYTES = 16 * 1024
PARENT_POLL_MS = 1000
TICK_MS = 50
"""How often memory is looked at, and so how coarse that limit is."""
SETUP_S = 20.0
PAGE = os.sysconf("SC_PAGE_SIZE")

# Imported before any case forks, so that a case pays nothing for them. The underscored ones are extension modules with
# system libraries behind them, which cannot be loaded later because the root has no system libraries.
_PRELOAD = """
_bz2 _ctypes _decimal _elementtree _hashlib _lzma _sqlite3 _uuid array bisect calendar cmath collections
collections.abc contextlib copy dataclasses datetime decimal enum fractions functools hashlib heapq inspect io
itertools json math numbers operator pprint queue random re statistics string struct tempfile textwrap threading
time traceback types typing unicodedata zlib
"""


def main() -> NoReturn:
    """Entry point: ``argv`` holds the package's directory, the control socket, and the judge's pid."""
    control = socket.socket(fileno=int(sys.argv[2]))
    judge = int(sys.argv[3])
    try:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _preload()
        two_uids = namespaces.enter_zygote_namespaces(proc)
        zygote = os.fork()
    except OSError as exc:
        _refuse(control, exc)
    if zygote:
        control.close()
        _keep(zygote, judge)
    try:
        serve = _prepare(control, proc, two_uids)
    except OSError as exc:
        _refuse(control, exc)
    serve.run()


def _refuse(control: socket.socket, exc: OSError) -> NoReturn:
    control.send(json.dumps({"fault": exc.strerror or str(exc), "errno": exc.errno}).encode())
    os._exit(1)


def _preload() -> None:
    for name in _PRELOAD.split():
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an interpreter built without it; the program that wants it will say so


def _keep(zygote: int, judge: int) -> NoReturn:
    """Wait until the zygote ends, the judge ends, or the judge closes our standard input; then leave nothing behind."""
    ending = os.pidfd_open(zygote)
    poller = select.poll()
    poller.register(ending, select.POLLIN)
    poller.register(0, select.POLLIN)
    while not poller.poll(PARENT_POLL_MS):
        if os.getppid() != judge:
            break
    os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)
    os._exit(0)


def _prepare(control: socket.socket, proc: int, two_uids: bool) -> Server:
    socket.sethostname("sandbox")
    namespaces.build_root()
    namespaces.become_nobody(two_uids)
    linux.die_with_parent()
    linux.no_new_privileges()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    gc.collect()
    gc.freeze()
    gc.disable()
    ruleset = landlock.build_ruleset(namespaces.BOX)
    server = Server(control, case.Tools(proc, ruleset, seccomp.build_filter(linux.MACHINE)))
    control.send(json.dumps({"capabilities": server.capabilities()}).encode())
    return server


class Server:
    """Serves one request at a time: limits in, one case run, how it ended out."""

    def __init__(self, control: socket.socket, tools: case.Tools) -> None:
        self.control = control
        self.tools = tools
        self.pid = os.readlink("self", dir_fd=tools.proc)

    def capabilities(self) -> list[str]:
        """What is in force for every case; the judge's probe exercises the rest."""
        names = ["user", "pid", "mount", "net", "ipc", "uts", "cgroup", "no_new_privs", "rlimits", "seccomp"]
        if self.tools.ruleset is not None:
            names.append("landlock")
        if _children(self.tools.proc, self.pid) is not None:
            names.append("memory_total")
        return names

    def run(self) -> NoReturn:
        """Serve until the judge hangs up."""
        while True:
            message, fds, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 3)
            if not message:
                os._exit(0)
            reply = self.one(json.loads(message), fds)
            self.control.send(json.dumps(reply).encode())
            self.reap()

    def one(self, limits: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Run one case on the judge's three files: request, result, output."""
        status_r, status_w = os.pipe()
        try:
            pid = linux.clone(namespaces.CASE_FLAGS)
        except OSError as exc:
            return {"fault": str(exc)}
        if pid == 0:
            case.init(self.tools, limits, fds, status_w)
        os.close(status_w)
        for fd in fds:
            os.close(fd)
        try:
            return Watch(self, pid, status_r, limits).run()
        finally:
            os.close(status_r)

    def reap(self) -> None:
        """Collect the inits of earlier cases; taking down their namespaces is the kernel's work, not our wait."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


class Watch:
    """The clock and the scales beside one running case."""

    def __init__(self, server: Server, pid: int, status: int, limits: dict[str, Any]) -> None:
        self.server = server
        self.pid = pid
        self.status = status
        self.memory_bytes = limits["memory_mb"] << 20
        self.wall_s = limits["wall_s"]
        self.started: float | None = None
        self.deadline = time.monotonic() + SETUP_S
        self.said = b""
        self.poller = select.poll()
        self.poller.register(status, select.POLLIN)
        self.poller.register(server.control, select.POLLIN)

    def run(self) -> dict[str, Any]:
        """Watch until the case's init reports, or has to be killed."""
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return self.kill("wall")
            for fd, _ in self.poller.poll(min(left * 1000 + 1, TICK_MS)):
                if fd != self.status:
                    os._exit(0)  # the judge hung up in the middle: the whole pid namespace goes with us
                done = self.hear()
                if done is not None:
                    return done
            if self.started is not None and self.too_big():
                return self.kill("memory")

    def hear(self) -> dict[str, Any] | None:
        """Read what the case's processes said; the reply once one of them had the last word."""
        chunk = os.read(self.status, 4096)
        self.said += chunk
        if self.started is None and self.said.startswith(case.READY):
            self.started = time.monotonic()
            self.deadline = self.started + self.wall_s
        report = self.said.removeprefix(case.READY)
        if report.endswith(b"\n"):
            return self.reply(**json.loads(report))
        if not chunk:
            os.waitpid(self.pid, 0)
            return self.reply(vanished=True)
        return None

    def kill(self, why: str) -> dict[str, Any]:
        """Kill the init, and with it every process of the case; returns once they are gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if self.started is None:
            return {"fault": f"a case was not ready after {SETUP_S:.0f} s"}
        return self.reply(killed=why)

    def reply(self, **report: Any) -> dict[str, Any]:
        """The report with the time the payload had."""
        elapsed = 0.0 if self.started is None else time.monotonic() - self.started
        return {**report, "wall_ms": elapsed * 1000}

    def too_big(self) -> bool:
        """Whether the case's processes together hold more private memory than one may."""
        pages, todo = 0, list(_children(self.server.tools.proc, self.server.pid) or ())
        while todo:
            pid = todo.pop()
            pages += _private_pages(self.server.tools.proc, pid)
            todo += _children(self.server.tools.proc, pid) or ()
        return pages * PAGE > int(self.memory_bytes)


def _children(proc: int, pid: str) -> list[str] | None:
    """Pids, as the host numbers them, of all children of all threads of a process; None where the kernel hides them."""
    try:
        tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:
        return None
    try:
        found: list[str] = []
        for task in os.listdir(tasks):
            found += _read_at(tasks, f"{task}/children").split()
        return found
    except OSError:
        return None
    finally:
        os.close(tasks)


def _private_pages(proc: int, pid: str) -> int:
    try:
        _, resident, shared, *_ = _read_at(proc, f"{pid}/statm").split()
    except (OSError, ValueError):
        return 0  # it ended while we looked
    return int(resident) - int(shared)


def _read_at(directory: int, path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(fd, 1 << 16).decode()
    finally:
        os.close(fd)
