"""The sender of a weight transfer to ``token_server``, as vLLM's own goes about it, over sockets."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar

from safetensors.torch import save

from agentopd.engines.broadcast import WeightStream


class SocketTrainer:
    """Sends what it reads as the bytes of a file. ``faults`` says what servers do, by their ports, in the next update;
    like NCCL it then waits for ever for who is not there."""

    faults: ClassVar[dict[str, str]] = {}
    opened: ClassVar[list[int]] = []
    """The sizes of the groups so far."""
    members: ClassVar[list[socket.socket]] = []
    """Of all of them: a group that a run gives up is closed by nobody."""

    def __init__(self, client: Any, stream: WeightStream, host: str, port: int, size: int) -> None:
        self._client, self._stream = client, stream
        self.opened.append(size)
        with socket.create_server((host, port)) as meeting, ThreadPoolExecutor(1) as beside:
            meeting.settimeout(10)
            info = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size}
            joined = beside.submit(client.init_weight_transfer_engine, info)
            self._members = [meeting.accept()[0] for _ in range((size - 1) // 2)]  # a server has two workers
            self.members += self._members
            firsts = sorted(int.from_bytes(member.recv(4)) for member in self._members)
            assert firsts == list(range(1, size, 2))
            joined.result()

    def send_weights(self) -> None:
        """One update."""
        names = [name for name, _, _ in self._stream.shapes()]
        self._client.start_weight_update()
        beside = ThreadPoolExecutor(1)
        updated = beside.submit(self._client.update_weights, {"names": names, "faults": dict(self.faults)})
        tensors = dict(self._stream)
        assert list(tensors) == names
        raw = save({name: tensor.clone() for name, tensor in tensors.items()}, {"format": "pt"})
        for member in self._members:
            member.sendall(len(raw).to_bytes(8) + raw)
        if "dies" in self.faults.values():
            threading.Event().wait()
        updated.result()
        beside.shutdown(wait=False)
        self._client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave."""
        for member in self._members:
            member.close()


@contextmanager
def faulty(**faults: str) -> Iterator[None]:
    """Servers misbehave in the updates in here."""
    SocketTrainer.faults.update(faults)
    try:
        yield
    finally:
        SocketTrainer.faults.clear()
