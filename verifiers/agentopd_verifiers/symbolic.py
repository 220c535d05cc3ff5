"""Stage two of the math verdict: SymPy in a small pool of processes that can be killed.

Workers start on first use. A comparison that exhausts its CPU budget ends its worker, which is replaced; a comparison
that makes no progress for ``wall_s`` is killed and is an ``InfraError``, because only a starved machine does that.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from agentopd.errors import InfraError

Mode = Literal["equal", "antiderivative"]
_SCRIPT = Path(__file__).with_name("symbolic_worker.py")


class SymbolicStatus(StrEnum):
    """How a symbolic comparison ended."""

    EQUAL = "equal"
    DIFFERENT = "different"
    BAD_GOLD = "bad_gold"
    BAD_ANSWER = "bad_answer"
    UNDECIDED = "undecided"
    TIMEOUT = "timeout"
    RESOURCE = "resource"


@dataclass(frozen=True)
class SymbolicResult:
    """The status, and the library's words where it failed."""

    status: SymbolicStatus
    detail: str = ""


_ERRORS = {
    "gold": SymbolicStatus.BAD_GOLD,
    "answer": SymbolicStatus.BAD_ANSWER,
    "compare": SymbolicStatus.UNDECIDED,
    "memory": SymbolicStatus.RESOURCE,
}
_DEATHS = {
    signal.SIGXCPU: SymbolicResult(SymbolicStatus.TIMEOUT, "the CPU budget ran out"),
    signal.SIGSEGV: SymbolicResult(SymbolicStatus.RESOURCE, "the comparison exhausted the stack"),
}


class SymbolicPool:
    """Up to ``size`` workers; ``check`` blocks and may be called from any thread."""

    def __init__(self, size: int = 2, cpu_s: int = 1, wall_s: float = 120.0) -> None:
        self._cpu_s, self._wall_s = cpu_s, wall_s
        self._slots = threading.BoundedSemaphore(size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._live: set[_Worker] = set()
        self.close = weakref.finalize(self, _stop_all, self._live)
        """Kill every worker; idempotent, and called at exit."""

    def check(self, gold: str, answer: str, mode: Mode = "equal", significant: int = 6) -> SymbolicResult:
        """Compare two LaTeX expressions that passed the static limits.

        Raises:
            InfraError: if the worker cannot start, is starved, or is killed by someone else.

        """
        request = {"gold": gold, "answer": answer, "mode": mode, "significant": significant, "cpu_s": self._cpu_s}
        with self._slots, self._worker() as worker:
            reply = worker.ask(json.dumps(request), self._wall_s)
            if reply is None:
                code = worker.stop()
                death = _DEATHS.get(signal.Signals(-code)) if code < 0 else None
                if death is None:
                    raise InfraError(f"the symbolic worker died with exit code {code}")
                return death
        if "equal" in reply:
            return SymbolicResult(SymbolicStatus.EQUAL if reply["equal"] else SymbolicStatus.DIFFERENT)
        return SymbolicResult(_ERRORS[str(reply["error"])], str(reply.get("detail", "")))

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """An idle worker, or a new one; it goes back to the pool only if it is still running."""
        with self._lock:
            while self._idle and not self._idle[-1].running:
                dead = self._idle.pop()
                dead.stop()
                self._live.discard(dead)
            worker = self._idle.pop() if self._idle else _Worker()
            self._live.add(worker)
        try:
            yield worker
        except BaseException:
            worker.stop()
            raise
        finally:
            with self._lock:
                if worker.running:
                    self._idle.append(worker)
                else:
                    self._live.discard(worker)


class _Worker:
    """One process. Its script imports nothing of AgentOPD, and ``-P`` keeps this folder off its path."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as exc:
            raise InfraError(f"cannot start the symbolic worker: {exc}") from exc

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str, wall_s: float) -> dict[str, object] | None:
        """Send one line and read one; None if the process ended instead of answering."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        reply, deadline = b"", time.monotonic() + wall_s
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise InfraError(f"the symbolic worker gave no answer in {wall_s:g} s: is the machine overloaded?")
            chunk = os.read(stdout.fileno(), 65536)
            if not chunk:
                return None
            reply += chunk
        found: dict[str, object] = json.loads(reply)
        return found

    def stop(self) -> int:
        """Kill and reap; returns the exit code (minus the signal that ended it)."""
        if self.running and not self._ended_by_itself():
            self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        return code

    def _ended_by_itself(self) -> bool:
        """A process that closed its output is about to be reaped; its own exit code is worth the short wait."""
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], 0)
        try:
            return bool(ready) and self._process.wait(timeout=1.0) is not None
        except subprocess.TimeoutExpired:
            return False


def _stop_all(workers: set[_Worker]) -> None:
    for worker in list(workers):
        worker.stop()
    workers.clear()
