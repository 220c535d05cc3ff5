"""The trusted half inside a container: one cell that talks to the judge over standard input and output.

A request is two lengths and as many bytes of limits (JSON) and of request; a reply is three lengths and as many bytes
of how it ended (JSON), report and output. Imports only the standard library.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import sys
from typing import NoReturn

from agentopd_sandboxes import case, cell, landlock, linux, seccomp, wire, zygote
from agentopd_sandboxes.scales import Scales

REQUEST, REPLY = struct.Struct(">II"), struct.Struct(">III")
HELLO = b"agentopd"
IN_FD, OUT_FD = 61, 62
WRITABLE = ("/work", "/tmp", "/dev/shm")
_READABLE = ("/usr", "/lib", "/lib64", "/opt", "/etc")


def main() -> NoReturn:
    """Entry point of the container: lock down, say what is in force, serve until standard input ends."""
    zygote.preload(zygote.COMMON)  # the rest can be imported here, and only one program would gain
    case.rehearse()
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    readable = [path for path in {*sys.path, *_READABLE} if os.path.isdir(path)]
    ruleset = landlock.build_ruleset(*WRITABLE, readable=readable)
    guarded = (1, os.getpid())
    tools = cell.Tools(proc, ruleset, seccomp.build_filter(linux.MACHINE, guarded), own_users=False)
    files = [os.memfd_create(name) for name in ("request", "report", "output")]
    _arrange_descriptors()
    for number in (signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    cell.lock_down(tools)
    zygote.tidy_interpreter({"HOME": case.WORK, "TMPDIR": "/tmp", "LANG": "C.UTF-8"})
    gc.collect()
    gc.freeze()
    gc.disable()
    hello = ["no_new_privs", "rlimits", "seccomp"] + ["landlock"] * (ruleset is not None)
    hello += ["memory_total"] * Scales(proc).sees_children()
    _write(HELLO + REPLY.pack(len(json.dumps(hello)), 0, 0) + json.dumps(hello).encode())
    _serve(cell.Cell(tools, IN_FD, WRITABLE, _restore), files)


def _arrange_descriptors() -> None:
    """Keep the judge's two streams where a case closes them, and leave it empty standard ones."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(0, IN_FD, inheritable=False)
    os.dup2(1, OUT_FD, inheritable=False)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _restore() -> None:
    """Undo what a case may have done to the two directories that are its own."""
    for directory in WRITABLE[:2]:
        os.chmod(directory, 0o700)


def _serve(place: cell.Cell, files: list[int]) -> NoReturn:
    while True:
        lengths = _read(REQUEST.size)
        about, size = REQUEST.unpack(lengths)
        limits = json.loads(_read(about))
        for file in files:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
        while size:
            chunk = _read(min(size, 1 << 20))
            os.write(files[0], chunk)
            size -= len(chunk)
        reply = place.run(limits, [os.dup(file) for file in files])
        if not reply.get("last") and not place.emptied():
            reply["last"] = True
        ended = json.dumps(reply).encode()
        report = os.pread(files[1], wire.MAX_FRAME_BYTES + 1, 0)
        output = os.pread(files[2], limits["output_bytes"] + 1, 0)
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
