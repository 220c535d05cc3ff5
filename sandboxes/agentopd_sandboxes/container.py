"""The judge's end of one container: create it hardened, talk to the agent in it, remove it.

Everything here blocks; ``docker`` calls it from threads.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from agentopd.contracts import SandboxLimits
from agentopd.errors import SandboxError
from agentopd_sandboxes import ledger, seccomp, wire
from agentopd_sandboxes.image import AGENT_HOME
from agentopd_sandboxes.pool import CellDied
from agentopd_sandboxes.protocol import Outcome, pack_limits
from agentopd_sandboxes.watch import PATIENCE

START_S = 60.0
GRACE_S = 30.0
SPARE_MB = 64
"""Memory of the agent and of what the kernel charges to the container, beyond a case's own."""
SPARE_PIDS = 4
NOBODY = "65534:65534"
HELLO = b"agentopd"
REQUEST, REPLY = struct.Struct(">I"), struct.Struct(">III")
_STREAM = struct.Struct(">BxxxI")
_STDOUT = 1
_MAX_PART = 64 << 20
_BOOT = (
    "import sys, types; package = types.ModuleType('agentopd_sandboxes'); "
    f"package.__path__ = ['{AGENT_HOME}/agentopd_sandboxes']; sys.modules[package.__name__] = package; "
    "from agentopd_sandboxes import agent; agent.main()"
)
_COMMAND = ["python3", "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT]


def hardened(limits: SandboxLimits) -> dict[str, Any]:
    """What the engine is told about a container for these limits.

    Its agent ends with the judge's end of its standard input, and ``auto_remove`` has the engine clear away the rest.
    """
    disk = f"size={4 * limits.file_mb}m,nr_inodes=4096,mode=700,uid=65534,gid=65534,nosuid,nodev,noexec"
    memory = f"{limits.memory_mb + SPARE_MB}m"
    return {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true", f"seccomp={json.dumps(seccomp.container_profile())}"],
        "pids_limit": limits.processes + SPARE_PIDS,
        "mem_limit": memory,
        "memswap_limit": memory,
        "nano_cpus": 10**9,
        "init": True,
        "ipc_mode": "private",
        "shm_size": f"{4 * limits.file_mb}m",
        "tmpfs": {"/work": disk, "/tmp": disk},
        "log_config": {"type": "none"},
        "auto_remove": True,
        "ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
    }


class Container:
    """A running container with an agent that answers. One program's cases, one at a time, then it is removed."""

    def __init__(
        self, client: Any, image: str, limits: SandboxLimits, runtime: str | None, knock: Callable[[], None]
    ) -> None:
        self.client = client
        self._knock = knock
        self.limits = limits
        self.usable = True
        self.capabilities: frozenset[str] = frozenset()
        api = client.api
        host = api.create_host_config(**hardened(limits), **({"runtime": runtime} if runtime else {}))
        made = api.create_container(
            image, _COMMAND, user=NOBODY, stdin_open=True, hostname="sandbox", labels=ledger.labels(), host_config=host,
            environment={"PYTHONHASHSEED": "0"}, network_disabled=True,
        )  # fmt: skip
        self.id: str = made["Id"]
        self._buffer = b""
        try:
            self._stream = api.attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            self._socket: socket.socket = getattr(self._stream, "_sock", self._stream)
            self._socket.settimeout(START_S)
            self._errors = b""
            api.start(self.id)
            self._greet()
        except BaseException:
            self.remove()
            raise

    def _greet(self) -> None:
        try:
            if self._take(len(HELLO)) != HELLO:
                raise SandboxError("the sandbox container does not run the agent; build its image again")
            about, *_ = REPLY.unpack(self._take(REPLY.size))
            self.capabilities = frozenset(json.loads(self._take(about)))
        except CellDied as exc:
            said = self._errors.decode(errors="replace").strip().splitlines()
            raise SandboxError(f"a sandbox container did not start: {said[-1] if said else exc}") from None

    def waits(self) -> bool:
        """Whether its agent still waits for a request: until it gets one, its end is all there is to hear."""
        ear = select.poll()
        ear.register(self._socket, select.POLLIN)
        return not ear.poll(0)

    def call(self, request: bytes, limits: SandboxLimits) -> Outcome:
        """Run one encoded request; ``CellDied`` if the container ended or went silent."""
        self.usable = False
        self._socket.settimeout(limits.wall_s * PATIENCE + GRACE_S)
        try:
            self._socket.sendall(REQUEST.pack(len(request)) + pack_limits(limits) + request)
        except OSError as exc:
            raise CellDied("a sandbox container does not listen") from exc
        try:
            lengths = REPLY.unpack(self._take(REPLY.size))
            if lengths[1] > wire.MAX_FRAME_BYTES + 1 or lengths[2] > limits.output_bytes + 1:
                raise CellDied("a sandbox container said more than it may")
            reply, report, output = (self._take(length) for length in lengths)
        except CellDied:
            if self._out_of_memory():
                return Outcome(None, "memory", 0.0, 0.0, b"", b"")
            raise
        ended = json.loads(reply)
        if "fault" in ended:
            raise SandboxError(f"the sandbox could not set up a case: {ended['fault']}")
        self.usable = not ended.get("last", False)
        return Outcome(
            ended.get("status"), ended.get("killed", ""), ended.get("cpu_s", 0.0), ended["wall_ms"], report, output
        )

    def _take(self, size: int) -> bytes:
        """That many bytes of the agent's standard output."""
        while len(self._buffer) < size:
            kind, length = _STREAM.unpack(self._read(_STREAM.size))
            if length > _MAX_PART:
                raise CellDied("a sandbox container sent a malformed stream")
            data = self._read(length)
            if kind == _STDOUT:
                self._buffer += data
            else:
                self._errors = (self._errors + data)[-4000:]
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                chunk = self._socket.recv(size - len(data))
            except OSError as exc:
                raise CellDied("a sandbox container does not answer") from exc
            if not chunk:
                raise CellDied("a sandbox container ended")
            data += chunk
        return data

    def _out_of_memory(self) -> bool:
        with suppress(Exception):
            self._knock()
            return bool(self.client.api.inspect_container(self.id)["State"]["OOMKilled"])
        return False

    def remove(self) -> None:
        """Kill and remove it; a container the engine no longer knows, or an engine that is gone, is no error."""
        with suppress(Exception):
            self._stream.close()
        with suppress(Exception):
            self._socket.close()
        with suppress(Exception):
            self._knock()
            self.client.api.remove_container(self.id, force=True, v=True)
