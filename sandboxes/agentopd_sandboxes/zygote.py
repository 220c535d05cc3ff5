"""The trusted half that lives inside: a keeper outside the pid namespace, and the zygote that is its first process.

The zygote is an interpreter that has everything imported; it goes on as the warden, which forks a cell for every case.
Started by ``slot.Zygote`` in a fresh interpreter; imports only the standard library.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import NoReturn

from agentopd_sandboxes import case, landlock, linux, namespaces, preload, seccomp
from agentopd_sandboxes.confine import Tools, lower_limits
from agentopd_sandboxes.scales import Scales
from agentopd_sandboxes.warden import Warden

PARENT_POLL_MS = 1000


def main() -> NoReturn:
    """Entry point: ``argv``: the package's directory, the control socket, the judge's pid, the libraries."""
    control = socket.socket(fileno=int(sys.argv[2]))
    judge = int(sys.argv[3])
    try:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        preload.preload()
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
    Warden(control, tools).serve()


def _refuse(control: socket.socket, exc: OSError) -> NoReturn:
    control.send(json.dumps({"fault": exc.strerror or str(exc), "errno": exc.errno}).encode())
    os._exit(1)


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


def _prepare(proc: int, two_uids: bool, libraries: dict[str, str]) -> Tools:
    socket.sethostname("sandbox")
    namespaces.build_root(libraries)
    namespaces.become_nobody(two_uids)
    linux.die_with_parent()
    lower_limits()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    tools = Tools(proc, landlock.build_ruleset(namespaces.BOX), seccomp.build_filter(linux.MACHINE, first=True))
    if libraries:
        sys.path.append(namespaces.PACKAGES)
        for name in libraries:
            importlib.import_module(name)
    case.rehearse()
    preload.tidy_interpreter({"HOME": namespaces.WORK, "TMPDIR": namespaces.TMP, "LANG": "C.UTF-8"})
    preload.freeze()
    return tools


def _capabilities(tools: Tools) -> list[str]:
    """What is in force for every case; the judge's probe exercises the rest."""
    names = ["user", "pid", "mount", "net", "ipc", "uts", "cgroup", "no_new_privs", "rlimits", "seccomp"]
    if tools.ruleset is not None:
        names.append("landlock")
    if Scales(tools.proc).sees_children():
        names.append("memory_total")
    return names
