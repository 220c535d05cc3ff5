"""One case's cell in the jail: a process that locks itself into fresh namespaces, waits, and becomes the case.

It is the first process of its pid namespace, so everything in the cell ends with it. All that does not depend on the
case is done before the judge asks for one: nothing of a program is there yet that could reach it. Imports only the
standard library.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from typing import NoReturn

from agentopd_sandboxes import case, landlock, linux, namespaces
from agentopd_sandboxes.bounds import SIZE, Bounds
from agentopd_sandboxes.confine import Tools, lock_down

READY = b"R"
BEGUN = struct.Struct(f"=Id{SIZE}s")
"""What a cell tells the warden when its case begins: its number, the time by the monotonic clock, its bounds."""
_REQUEST_FD, _JUDGE_FD, _WARDEN_FD, _UNUSED = range(case.REPORT_FD + 1, case.REPORT_FD + 5)
_ABOVE = 16


def be(tools: Tools, number: int, fds: list[int], warden: int, file_mb: int) -> NoReturn:
    """Be a cell. ``fds``: the judge's socket, request, report, output; ``warden``: a pipe for ``BEGUN``."""
    judge = fds[0]
    try:
        os.setsid()
        namespaces.write_maps(tools.proc, namespaces.NOBODY, namespaces.NOBODY)
        namespaces.mount_case_directory(file_mb)
        if tools.ruleset is not None:
            landlock.restrict(tools.ruleset)
        _arrange_descriptors(fds, warden)
        judge = _JUDGE_FD
        lock_down(tools)
        linux.close_from(_UNUSED)
        case.rehearse()
        os.write(judge, READY)
        message = os.read(judge, SIZE)
        if not message:
            os._exit(0)
        bounds = Bounds.unpack(message)
        request = case.unpack(_REQUEST_FD)
        case.set_limits(bounds, users=bounds.processes)
        os.write(_WARDEN_FD, BEGUN.pack(number, time.monotonic(), message))
    except BaseException as exc:
        try:
            refuse(judge, exc)
        finally:
            os._exit(1)  # whatever happens, the caller's code is not ours to go on with
    os.closerange(_REQUEST_FD, _UNUSED)
    case.begin(request)


def refuse(judge: int, exc: BaseException) -> None:
    """Tell the judge that a cell cannot be set up."""
    errno = exc.errno if isinstance(exc, OSError) else None
    os.write(judge, json.dumps({"fault": f"{type(exc).__name__}: {exc}", "errno": errno}).encode())


def _arrange_descriptors(fds: list[int], warden: int) -> None:
    """Put everything at its number: output, report, and those that are closed before the case begins."""
    judge, request, report, output, warden = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in (*fds, warden))
    places = {1: output, 2: output, case.REPORT_FD: report, _REQUEST_FD: request, _JUDGE_FD: judge, _WARDEN_FD: warden}
    for place, fd in places.items():
        os.dup2(fd, place, inheritable=False)
