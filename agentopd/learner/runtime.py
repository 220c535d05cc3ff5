"""Starting DeepSpeed quietly: alone in one process without a launcher, or as one rank of a launched job."""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as groups

from agentopd.config.learner import LearnerConfig
from agentopd.errors import InfraError
from agentopd.models import take_device

_DEADLINE_S: float = LearnerConfig.model_fields["collective_timeout_s"].default
_EXPIRED = re.compile(r"timed? ?out", re.IGNORECASE)
_GONE = re.compile(r"connection (closed|reset)|pair closure|broken pipe", re.IGNORECASE)


def join(deadline_s: float) -> None:
    """``start`` under a launcher, before anything else: the first to talk to other ranks may not be the learner."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        start(deadline_s)


def start(deadline_s: float = _DEADLINE_S) -> Any:
    """Join (or found) the process group and return the imported ``deepspeed`` module. Idempotent.

    Under a launcher (``torchrun``, ``deepspeed``) the group comes from its environment variables; otherwise this
    process is the whole group, and no port is opened. ``deadline_s`` is that of every collective, of this group and of
    those that DeepSpeed makes; raises ``InfraError`` where the other ranks do not come within it.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        backend, deadline = "nccl" if on_gpu else "gloo", timedelta(seconds=deadline_s)
        # Groups do not inherit it, and DeepSpeed makes its own, without one: they take what stands here.
        groups.default_pg_timeout = groups.default_pg_nccl_timeout = deadline  # type: ignore[attr-defined]
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            take_device()  # what the ranks tell one another goes over the current GPU
            with waiting_for_ranks():
                dist.init_process_group(backend, timeout=deadline)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=deadline)
    with quiet():
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory collective serves inference only, and would be compiled at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's banners and the deprecations of its own imports off the terminal.

    It also runs a full garbage collection for each banner: objects that exist already are exempted from it.
    """
    gc.freeze()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
            yield
    finally:
        gc.unfreeze()


@contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """Turn what a collective raises where another rank stays away, or has ended, into one ``InfraError``.

    On a GPU, NCCL's watchdog ends the process instead, with a message that names the collective.
    """
    try:
        yield
    except RuntimeError as exc:
        if not isinstance(exc, dist.DistError) and not _from_gloo(exc):
            raise
        deadline_s = groups.default_pg_timeout.total_seconds()
        me, look = os.environ.get("RANK", "0"), "read the output of the others, then agentopd resume"
        if _EXPIRED.search(str(exc)):
            what = f"waited {deadline_s:g} s (learner.collective_timeout_s) for a rank that hangs or never started"
        elif _GONE.search(str(exc)):
            what = "lost a rank that has ended"
        else:
            raise
        raise InfraError(f"rank {me} {what}: {look}; {str(exc).splitlines()[0]}") from exc


def _from_gloo(exc: RuntimeError) -> bool:
    return type(exc) is RuntimeError and ("gloo" in str(exc) or "pair closure" in str(exc))


def world_size() -> int:
    """Number of data-parallel ranks (1 before ``start``)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process (0 before ``start``)."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum of a tensor over the ranks, as a new tensor."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def all_reduce_max(value: int) -> int:
    """The largest of the ranks' values."""
    return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX))


def _reduced(tensor: Tensor, op: Any) -> Tensor:
    if world_size() == 1:
        return tensor.clone()
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    total = tensor.to(device, copy=True)
    with waiting_for_ranks():
        dist.all_reduce(total, op)
    return total.to(tensor.device)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with waiting_for_ranks():
        dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        all_reduce_max(0)
