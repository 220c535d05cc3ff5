"""Sockets in the place of NCCL: with them vLLM's ``nccl`` weight transfer runs on a CPU, all but the collective itself.

vLLM loads it in a server as one of its plugins, and a test calls ``install`` in the learner.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


class Wire:
    """What ``PyNcclCommunicator`` does for a weight transfer, over the sockets of its group."""

    def __init__(self, group, device) -> None:
        self.group = group

    def broadcast(self, tensor, src, stream=None) -> None:
        raw = tensor.view(torch.uint8).numpy().tobytes() if self.group.rank == src else None
        raw = self.group.broadcast_obj(raw, src)
        if self.group.rank != src:
            tensor.copy_(torch.frombuffer(bytearray(raw), dtype=tensor.dtype).view(tensor.shape))

    def destroy(self) -> None:
        pass


def install() -> None:
    """Replace NCCL in this process."""
    from vllm.distributed.device_communicators import pynccl

    pynccl.PyNcclCommunicator = Wire
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(synchronize=lambda: None)
