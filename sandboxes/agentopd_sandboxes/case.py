"""One case, from the inside: the locks that depend on its limits, and the untrusted program.

Runs in a process that has put on all other locks. Imports only the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import math
import os
import resource
import sys
import types
from typing import Any, NoReturn

from agentopd_sandboxes import landlock, wire
from agentopd_sandboxes.bounds import SIZE, Bounds

READY = b"R"
REPORT_FD = 3
LOW_FDS, MAX_FDS = 16, 64
"""Descriptors are moved above the first to free the fixed ones; an agent never has as many as the second."""
WORK = "/work"
MAIN_FILE = "/work/solution.py"
MODULE = "solution"
DETAIL_CHARS = 2000

_OUT_OF = frozenset((errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.EAGAIN))


def wait(files: list[int], orders: int, status: int, ruleset: int | None) -> NoReturn:
    """Be a case once the pipe ``orders`` brings its limits; ``status`` is told how its set-up went."""
    try:
        rehearse()
        message = os.read(orders, SIZE)
        if message:
            main(Bounds.unpack(message), [*files, status], ruleset)
    finally:
        os._exit(1)


def main(bounds: Bounds, fds: list[int], ruleset: int | None) -> NoReturn:
    """Be a case. ``fds``: request, report, output, and one that is told ``READY`` or a fault. Never returns."""
    try:
        os.setsid()
        request = unpack(fds[0])
        if ruleset is not None:
            landlock.restrict(ruleset)
        status = _arrange_descriptors(fds)
        set_limits(bounds)
        os.closerange(REPORT_FD + 1, status)
        os.closerange(status + 1, MAX_FDS)
        os.write(status, READY)
        os.close(status)
    except BaseException as exc:
        os.write(fds[3], f"{type(exc).__name__}: {exc}".encode())
        os._exit(1)
    begin(request)


def unpack(fd: int) -> dict[str, Any]:
    """The request in a file, with its program and support files written to the caller's new working directory."""
    request: dict[str, Any] = wire.decode(os.pread(fd, os.fstat(fd).st_size, 0), wire.MAX_REQUEST_NODES)
    _write_files(request["files"], request["source"])
    return request


def begin(request: dict[str, Any]) -> NoReturn:
    """Run the untrusted program: every lock is on, and descriptor 3 is the report."""
    try:
        gc.enable()
        worker = os.getpid()
        report = _run(request)
        if os.getpid() == worker:  # a child that the payload forked may come this way too; it has nothing to report
            _finish(request["id"], *report)
    finally:
        os._exit(1)


def rehearse() -> None:
    """Do what every case does, with an empty program: before a fork it fills caches, before a wait it touches pages."""
    about = {
        "source": "def f(n): return [n]",
        "setup": "n, *_ = args",
        "expression": "f(n)",
        "args": (1, 2.5, "", None),
    }
    value = _evaluate(wire.decode(wire.encode(about)))
    wire.pack_frame(bytes(wire.ID_BYTES), wire.VALUE, wire.encode(value))
    del sys.modules[MODULE]


def settle(directory: str) -> None:
    """Live in another directory than ``/work``."""
    global WORK, MAIN_FILE
    WORK, MAIN_FILE = directory, f"{directory}/solution.py"
    sys.path.insert(0, directory)


# --- locking down ----------------------------------------------------------------------------------------------------


def _write_files(files: dict[str, str], source: str) -> None:
    os.chdir(WORK)
    for name, text in {**files, MAIN_FILE: source}.items():
        if name is not MAIN_FILE and "/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o400)
        left = memoryview(text.encode("utf-8", "surrogatepass"))
        while left:
            left = left[os.write(fd, left) :]
        os.close(fd)


def _arrange_descriptors(fds: list[int]) -> int:
    """Put the report at its number, output at 1 and 2; returns where the status pipe now is."""
    _, report, output, status = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOW_FDS) for fd in fds)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(report, REPORT_FD, inheritable=False)
    return status


def set_limits(bounds: Bounds, users: int = 0) -> None:
    """Put on the limits of one case; ``users``: how many processes of the caller's user there may be, if not 0."""
    cpu_s = max(1, math.ceil(bounds.cpu_s))
    lower(resource.RLIMIT_AS, bounds.memory_mb << 20)
    lower(resource.RLIMIT_FSIZE, bounds.file_mb << 20)
    if users:
        lower(resource.RLIMIT_NPROC, users)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))


def lower(kind: int, most: int) -> None:
    """Set a resource limit, hard and soft, without raising the one in force."""
    _, hard = resource.getrlimit(kind)
    ceiling = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (ceiling, ceiling))


# --- the untrusted part ----------------------------------------------------------------------------------------------


def _run(request: dict[str, Any]) -> tuple[bytes, bytes]:
    """Evaluate the case; the kind and body of the frame to report. An early exit reports nothing."""
    try:
        value = _evaluate(request)
    except SystemExit as exc:
        _flush()
        os._exit(exc.code if type(exc.code) is int else 0)
    except BaseException as exc:
        return _kind_of(exc), _describe(exc)
    try:
        return wire.VALUE, wire.encode(value)
    except wire.WireTypeError as exc:
        return wire.BAD_TYPE, _describe(exc)
    except (wire.WireSizeError, MemoryError) as exc:
        return wire.RESOURCE, _describe(exc)
    except BaseException as exc:
        return wire.BAD_TYPE, _describe(exc)


def _evaluate(request: dict[str, Any]) -> Any:
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    names = module.__dict__
    names["__file__"] = MAIN_FILE
    exec(compile(request["source"], MAIN_FILE, "exec", dont_inherit=True), names)
    names["args"] = request["args"]
    exec(compile(request["setup"], "<setup>", "exec", dont_inherit=True), names)
    return eval(compile(request["expression"].strip(), "<expression>", "eval", dont_inherit=True), names)


def _kind_of(exc: BaseException) -> bytes:
    ran_out = isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno in _OUT_OF)
    return wire.RESOURCE if ran_out else wire.EXCEPTION


def _describe(exc: BaseException) -> bytes:
    try:
        text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    except Exception:
        text = "an exception that cannot be described"
    return wire.encode(text[:DETAIL_CHARS])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue  # closed, replaced or over its limit by the payload: the output is lost, the value is not


def _finish(request_id: bytes, kind: bytes, body: bytes) -> NoReturn:
    _flush()
    left = memoryview(wire.pack_frame(request_id, kind, body))
    while left:
        left = left[os.write(REPORT_FD, left) :]
    os._exit(0)
