"""One server on this machine: started in a session of its own, and ended with every process it started.

It dies with the thread that starts it (``vllm_launch``): start it from one that lives as long as it should.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from agentopd.engines import vllm_launch
from agentopd.engines.http import Address

_HOST = "127.0.0.1"
_GRACE_S = 10.0
_TAIL = 4096


class ServerProcess:
    """``module`` is run with ``arguments``, ``--model``, ``--host`` and ``--port``; ``log`` gets its output.

    A start takes a free port, so that one which somebody else took meanwhile costs no more than another start.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._words = [sys.executable, "-P", vllm_launch.__file__, module, *arguments]
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, model: Path) -> Address:
        """Start it with the weights in ``model``; returns where it will listen."""
        address = Address(_HOST, _free_port())
        words = [*self._words, "--model", str(model), "--host", _HOST, "--port", str(address.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, vllm_launch.PARENT: str(os.getpid())},
                start_new_session=True,
            )
        return address

    @property
    def pid(self) -> int | None:
        """Of the running server, which leads its process group."""
        return self._process.pid if self._process is not None and self.exit_code is None else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before it was started."""
        return self._process.poll() if self._process is not None else None

    def last_words(self) -> str:
        """The last line that it wrote, if any."""
        try:
            lines = self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return ""
        return lines[-1].strip() if lines else ""

    def stop(self) -> None:
        """Ask it to end, and kill what is left of it after a while; idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self.kill()

    def kill(self) -> None:
        """End the server and every process of its group at once; idempotent."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
