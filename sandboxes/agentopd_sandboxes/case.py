"""One case, from the inside: its init, the locks it puts on, and the untrusted program.

``init`` runs as the first process of fresh namespaces and forks the worker that locks itself down and becomes the
payload. The init cannot be signalled or traced by the payload; when the payload ends it kills whatever the payload
left running, waits until all of it is gone, and only then reports. Imports only the standard library.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import math
import os
import random
import resource
import signal
import sys
import types
from dataclasses import dataclass
from typing import Any, NoReturn

from agentopd_sandboxes import landlock, linux, namespaces, wire

READY = b"R"
REPORT_FD = 3
OPEN_FILES = 64
LOW_FDS, MAX_FDS = 16, 1024
"""Descriptors are moved above the first to free the fixed ones; the zygote never has as many as the second."""
STACK_BYTES = 8 << 20
MAIN_FILE = "/work/solution.py"
MODULE = "solution"
DETAIL_CHARS = 2000

_OUT_OF = frozenset((errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EDQUOT, errno.EAGAIN))


@dataclass(frozen=True)
class Tools:
    """What every case needs from its zygote; none of it survives into the payload."""

    proc: int
    """Descriptor of the host's ``/proc``, for uid maps and for weighing."""
    ruleset: int | None
    filter: bytes


def init(tools: Tools, limits: dict[str, Any], fds: list[int], status: int) -> NoReturn:
    """Set up the case's directory, fork the worker, clean up after it, report how it ended. Never returns."""
    try:
        os.setsid()
        namespaces.write_maps(tools.proc, namespaces.NOBODY, namespaces.NOBODY)
        namespaces.mount_case_directory(limits["file_mb"])
        worker = os.fork()
        if worker == 0:
            _work(tools, limits, fds, status)
        keep = {0, 1, 2, status}
        for fd in fds:
            if fd not in keep:
                os.close(fd)
        code, cpu_s = _outlive(worker)
        _say(status, {"status": code, "cpu_s": cpu_s})
    except BaseException as exc:
        _say(status, {"fault": f"{type(exc).__name__}: {exc}"})
    finally:
        os._exit(0)


def _say(status: int, report: dict[str, Any]) -> None:
    os.write(status, json.dumps(report).encode() + b"\n")


def _outlive(worker: int) -> tuple[int, float]:
    """Wait for the worker, then kill and collect everything else in this pid namespace."""
    while True:
        pid, code, usage = os.wait4(-1, 0)
        if pid == worker:
            break
    try:
        os.kill(-1, signal.SIGKILL)
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        return code, usage.ru_utime + usage.ru_stime


def _work(tools: Tools, limits: dict[str, Any], fds: list[int], status: int) -> NoReturn:
    try:
        request = _read_request(fds[0])
        _write_files(request["files"], request["source"])
        status = _arrange_descriptors(tools, fds, status)
        _set_limits(limits)
        _lock_down(tools)
        os.closerange(REPORT_FD + 1, status)
        os.closerange(status + 1, MAX_FDS)
        _tidy_interpreter()
        os.write(status, READY)
        os.close(status)
    except BaseException as exc:
        _say(status, {"fault": f"{type(exc).__name__}: {exc}"})
        os._exit(1)
    try:
        worker = os.getpid()
        report = _run(request)
        if os.getpid() == worker:  # a child that the payload forked may come this way too; it has nothing to report
            _finish(request["id"], *report)
    finally:
        os._exit(1)


# --- locking down ----------------------------------------------------------------------------------------------------


def _read_request(fd: int) -> dict[str, Any]:
    raw = bytearray()
    while chunk := os.pread(fd, 1 << 24, len(raw)):
        raw += chunk
    request: dict[str, Any] = wire.decode(bytes(raw), wire.MAX_REQUEST_NODES)
    return request


def _write_files(files: dict[str, str], source: str) -> None:
    os.chdir(namespaces.WORK)
    for name, text in {**files, MAIN_FILE: source}.items():
        directory = os.path.dirname(name)
        if directory:
            os.makedirs(directory, exist_ok=True)
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o400)
        left = memoryview(text.encode("utf-8", "surrogatepass"))
        while left:
            left = left[os.write(fd, left) :]
        os.close(fd)


def _arrange_descriptors(tools: Tools, fds: list[int], status: int) -> int:
    """Put the report at its number, output at 1 and 2; returns where the status pipe now is."""
    _, report, output = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LOW_FDS) for fd in fds)
    status = fcntl.fcntl(status, fcntl.F_DUPFD_CLOEXEC, LOW_FDS)
    if tools.ruleset is not None and tools.ruleset <= REPORT_FD:
        raise RuntimeError("the ruleset's descriptor is in the way")
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(report, REPORT_FD, inheritable=False)
    return status


def _set_limits(limits: dict[str, Any]) -> None:
    memory = limits["memory_mb"] << 20
    cpu_s = max(1, math.ceil(limits["cpu_s"]))
    files = limits["file_mb"] << 20
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, limits["processes"] + 1),  # the init counts too
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        ceiling = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))


def _lock_down(tools: Tools) -> None:
    linux.no_new_privileges()
    linux.drop_capabilities()
    if tools.ruleset is not None:
        landlock.restrict(tools.ruleset)
    linux.install_filter(tools.filter)


def _tidy_interpreter() -> None:
    """Leave the payload an interpreter that looks freshly started, and the same one every time."""
    for name in [name for name in sys.modules if name.split(".")[0] == __package__]:
        del sys.modules[name]
    sys.modules["__main__"].__dict__.clear()
    os.environ.clear()
    os.environ.update({"HOME": namespaces.WORK, "TMPDIR": namespaces.TMP, "LANG": "C.UTF-8"})
    sys.argv[:] = [MAIN_FILE]
    sys.path.insert(0, namespaces.WORK)
    random.seed(0)
    gc.enable()


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
