"""The trusted half that lives inside: a keeper outside the pid namespace, and the zygote that is its first process.

The zygote makes cells: for every program it forks one small init into fresh namespaces, and does nothing else. Neither
it nor a cell's init or stem handles more than descriptors and limits: programs, arguments and values pass through files
that the case opens itself, so nothing of one run can be found in the memory of the next.

Started by ``slot.Zygote`` in a fresh interpreter; imports only the standard library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
from typing import NoReturn

from agentopd_sandboxes import case, cell, landlock, linux, namespaces, seccomp
from agentopd_sandboxes.scales import Scales

PARENT_POLL_MS = 1000

COMMON = "bisect collections functools heapq itertools json math operator re string typing"
_PRELOAD = f"""{COMMON}
_bz2 _ctypes _decimal _hashlib _lzma _sqlite3 _uuid pyexpat array calendar cmath collections.abc contextlib copy
dataclasses datetime decimal enum fractions hashlib inspect io numbers pprint queue random statistics struct tempfile
textwrap threading time traceback types unicodedata zlib
"""
"""Imported before any case forks, so that a case pays nothing for them. The underscored ones are extension modules with
system libraries behind them, which cannot be loaded later because the root has no system libraries."""


def main() -> NoReturn:
    """Entry point: ``argv``: the package's directory, the control socket, the judge's pid, the libraries."""
    control = socket.socket(fileno=int(sys.argv[2]))
    judge = int(sys.argv[3])
    try:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        preload()
        two_uids = namespaces.enter_zygote_namespaces(proc)
        zygote = os.fork()
    except OSError as exc:
        _refuse(control, exc)
    if zygote:
        control.close()
        _keep(zygote, judge)
    try:
        tools = _prepare(proc, two_uids, json.loads(sys.argv[4]))
    except OSError as exc:
        _refuse(control, exc)
    control.send(json.dumps({"capabilities": _capabilities(tools)}).encode())
    _serve(control, tools)


def _refuse(control: socket.socket, exc: OSError) -> NoReturn:
    control.send(json.dumps({"fault": exc.strerror or str(exc), "errno": exc.errno}).encode())
    os._exit(1)


def preload(names: str = _PRELOAD) -> None:
    """Import what a case should not pay for."""
    for name in names.split():
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


def _prepare(proc: int, two_uids: bool, libraries: dict[str, str]) -> cell.Tools:
    socket.sethostname("sandbox")
    namespaces.build_root(libraries)
    namespaces.become_nobody(two_uids)
    linux.die_with_parent()
    linux.no_new_privileges()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    tools = cell.Tools(proc, landlock.build_ruleset(namespaces.BOX), seccomp.build_filter(linux.MACHINE))
    if libraries:
        sys.path.append(namespaces.PACKAGES)
        for name in libraries:
            importlib.import_module(name)
    case.rehearse()
    tidy_interpreter({"HOME": namespaces.WORK, "TMPDIR": namespaces.TMP, "LANG": "C.UTF-8"})
    gc.collect()
    gc.freeze()
    gc.disable()
    return tools


def tidy_interpreter(environ: dict[str, str]) -> None:
    """Leave the payload an interpreter that looks freshly started, and the same one every time."""
    for name in [name for name in sys.modules if name.split(".")[0] == __package__]:
        del sys.modules[name]
    sys.modules["__main__"].__dict__.clear()
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[:] = [case.MAIN_FILE]
    sys.path.insert(0, case.WORK)
    random.seed(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a pid namespace gets no signal without handler
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _capabilities(tools: cell.Tools) -> list[str]:
    """What is in force for every case; the judge's probe exercises the rest."""
    names = ["user", "pid", "mount", "net", "ipc", "uts", "cgroup", "no_new_privs", "rlimits", "seccomp"]
    if tools.ruleset is not None:
        names.append("landlock")
    if Scales(tools.proc).sees_children():
        names.append("memory_total")
    return names


def _serve(control: socket.socket, tools: cell.Tools) -> NoReturn:
    """Make one cell for every descriptor the judge sends, until it hangs up."""
    while True:
        message, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            os._exit(0)
        try:
            if linux.clone(namespaces.CELL_FLAGS) == 0:
                cell.init(tools, fds[0], int(message))
        except OSError as exc:
            os.write(fds[0], json.dumps({"fault": str(exc), "errno": exc.errno}).encode())
        os.close(fds[0])
        _reap()


def _reap() -> None:
    """Collect earlier cells; taking down their namespaces is the kernel's work, not our wait."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
