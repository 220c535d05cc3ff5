"""The learner's weights from its GPU to those of servers, by vLLM's own ``nccl`` weight transfer.

The sender is the first rank of a group whose others are the servers' workers. Whoever comes up, or back, makes another
group at the next sync. Where a transfer fails its servers take the weights from the folder, which is written behind:
only a collective that never ends stops the run, as nothing can take it back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from agentopd.engines.background import BackgroundLoop
from agentopd.engines.http import Away
from agentopd.engines.pool import Replica
from agentopd.engines.weight_sync import HEAD, tied_head
from agentopd.errors import EngineError
from agentopd.weights import full_shapes, full_weights

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_LOOK_S, _MERCY_S = 0.2, 20.0
"""How often a transfer is looked at, and how long it may go on when a server of it is lost."""
_SLACK_S, _FAREWELL_S = 5.0, 10.0
"""What a deadline around another one has more, so that the inner one tells who is late; and the deadline of a server's
part in leaving."""
SERVER_ARGS = {"weight_transfer_config": {"backend": "nccl"}}
"""Arguments that a server must be started with."""


class WeightStream:
    """The weights of ``model``, whole and one at a time, its tied output head spelled out last.

    With ``keeps`` what was read is also kept in the main memory. Under ZeRO-3 every rank must read a pass to its end.
    """

    def __init__(self, model: Any, keeps: bool) -> None:
        self._model, self._keeps = model, keeps
        self._tied = tied_head(model)
        self._kept: dict[str, Tensor] = {}
        self._pass: Iterator[tuple[str, Tensor]] = iter(())
        self.is_over = True
        """Whether the pass was read to its end."""

    def rewind(self) -> None:
        """Begin another pass."""
        self._kept, self.is_over = {}, False
        self._pass = self._read()

    def take_kept(self) -> dict[str, Tensor]:
        """What the pass read, which is not kept any longer."""
        kept, self._kept = self._kept, {}
        return kept

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of everything that a pass yields, in its order."""
        found = full_shapes(self._model)
        return [*found, *((HEAD, dtype, shape) for name, dtype, shape in found if name == self._tied)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """What is left of the pass."""
        return self._pass

    @torch.no_grad()
    def _read(self) -> Iterator[tuple[str, Tensor]]:
        head = None
        for name, weight in full_weights(self._model):
            head = weight if name == self._tied else head
            yield self._keep(name, weight)
        if head is not None:
            yield self._keep(HEAD, head)
        self.is_over = True

    def _keep(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        if self._keeps:
            self._kept[name] = weight.to("cpu", copy=True).contiguous()
        return name, weight


class Trainer:
    """vLLM's side of a transfer in the learner, whatever carries the tensors."""

    def send_weights(self) -> None:
        """Run one update."""

    def shutdown(self) -> None:
        """Leave the group."""


OpenTrainer = Callable[[Any, WeightStream, str, int, int], Trainer]
"""Makes the sender of a group from its client, what it sends, host and port of the meeting, and the group's size."""


class Broadcast:
    """Sends what ``stream`` reads to the servers of one rank; ``loop`` is where they are talked to.

    ``timeout_s`` is the deadline of making a group, and of sending.
    """

    def __init__(
        self, stream: WeightStream, loop: BackgroundLoop, timeout_s: float, open_trainer: OpenTrainer | None = None
    ) -> None:
        self.stream, self._loop, self._timeout_s = stream, loop, timeout_s
        self._open_trainer = open_trainer or nccl_trainer
        self._group: _Group | None = None

    def join(self, replicas: Sequence[Replica]) -> None:
        """Make a group with ``replicas``, if it is not the one there is. Raises ``EngineError`` or ``Away``."""
        members = [(replica.name, replica.life) for replica in replicas]
        if self._group is not None and self._group.members != members:
            self.leave()
        if self._group is None and replicas:
            client = _Client(self._loop, list(replicas), self._timeout_s)

            def work() -> Trainer:
                size = 1 + client.count_workers()
                return self._open_trainer(client, self.stream, _own_host(replicas), _free_port(), size)

            self._group = _Group(members, client, self._in_time(work, client, "meeting vLLM's servers"))

    def send(self, replicas: Sequence[Replica]) -> dict[str, str]:
        """Run one pass and give what it reads to ``replicas``; why it failed, by the names of those it failed on.

        The pass is read to its end, as other ranks may read along, unless a collective does not end: that raises
        ``Endless``, and whoever ends this process ends them.
        """
        self.stream.rewind()
        lost = self._try_to_send(replicas)
        if lost:
            _LOG.warning("weights go to %s through files: %s", ", ".join(lost), next(iter(lost.values())))
            self.leave()
        for _ in self.stream:
            pass
        if not self.stream.is_over:
            raise EngineError(f"the learner's weights could not be read to their end: {next(iter(lost.values()), '?')}")
        return lost

    def _try_to_send(self, replicas: Sequence[Replica]) -> dict[str, str]:
        is_met = False
        try:
            self.join(replicas)
            is_met = True
            if self._group is None:
                return {}
            self._in_time(self._group.trainer.send_weights, self._group.client, "sending weights to vLLM's servers")
            return self._group.client.lost
        except Exception as exc:  # vLLM's and the wire's own, of any kind
            if is_met and isinstance(exc, Endless):
                self._group = None  # nobody in it would hear a farewell
                raise
            return {replica.name: f"{type(exc).__name__}: {exc}" for replica in replicas}

    def leave(self) -> None:
        """Give up the group; idempotent. A server that does not take leave, or cannot, is left alone."""
        group, self._group = self._group, None
        if group is not None:
            for farewell in (group.client.give_up, group.trainer.shutdown):
                try:
                    self._in_time(farewell, group.client, "taking leave of vLLM's servers")
                except Exception as exc:
                    _LOG.info("a weight transfer was not closed: %s", exc)

    def _in_time(self, work: Callable[[], T], client: _Client, what: str) -> T:
        """``work``, in a thread that is left behind where a collective never ends. Raises ``Endless`` for that."""
        done: list[T] = []
        fault: list[Exception] = []
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        if device is not None:
            torch.cuda.synchronize()  # who sends reads on streams of its own, and the weights may just be changing

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                done.append(work())
            except Exception as exc:
                fault.append(exc)

        thread = threading.Thread(target=run, name="broadcast", daemon=True)
        thread.start()
        deadline = time.monotonic() + self._timeout_s + 2 * _SLACK_S
        why = f"rollout.vllm.timeout_s, {self._timeout_s:g} s, is over"
        while thread.is_alive():
            thread.join(_LOOK_S)
            if (missing := client.missing()) and (until := time.monotonic() + _MERCY_S) < deadline:
                deadline, why = until, f"lost in the middle of it: {missing}"
            if time.monotonic() > deadline and thread.is_alive():
                raise Endless(f"{what} does not end: {why}")
        if fault:
            raise fault[0]
        return done[0]


class Endless(EngineError):
    """A collective that nothing ends."""


@dataclass
class _Group:
    members: list[tuple[str, int]]
    client: _Client
    trainer: Trainer


@dataclass
class _Client:
    """The phases of an update on several servers at once, as vLLM's trainer side calls them."""

    loop: BackgroundLoop
    replicas: list[Replica]
    timeout_s: float
    workers: list[int] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    """Who failed where the others wait for them, and why."""

    def count_workers(self) -> int:
        """The workers of all servers. Raises ``Away``."""
        self.workers = self._wait(_all(replica.reach().workers() for replica in self.replicas))
        return sum(self.workers)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        firsts = [init_info["rank_offset"] + sum(self.workers[:place]) for place in range(len(self.workers))]
        questions = [{"init_info": init_info | {"rank_offset": first}} for first in firsts]
        self._each("init_weight_transfer_engine", questions, self.lost)
        if self.lost:
            raise EngineError(f"not every server can be met: {self.missing()}")

    def start_weight_update(self) -> None:
        self.lost = {}
        self._each("start_weight_update", [None] * len(self.replicas))

    def update_weights(self, update_info: Any) -> None:
        self._each("update_weights", [{"update_info": update_info}] * len(self.replicas), self.lost)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._each("finish_weight_update", [None] * len(self.replicas), self.lost)

    def give_up(self) -> None:
        """End an update that may be under way, and the group, on whoever hears it."""

        async def part(replica: Replica) -> None:
            for phase in ("finish_weight_update", "shutdown_weight_transfer_engine"):
                with suppress(Away, EngineError):
                    await replica.reach().transfer(phase, None, _FAREWELL_S)

        self._wait(_all(map(part, self.replicas)))

    def missing(self) -> str:
        """Servers that will take no part any more, and why; none is an empty text."""
        ended = {x.name: "it ended" for x in self.replicas if x.process is not None and x.process.exit_code is not None}
        return "; ".join(f"{name} ({why})" for name, why in sorted((self.lost | ended).items()))

    def _each(self, phase: str, questions: Sequence[Any], lost: dict[str, str] | None = None) -> None:
        """Ask every server; what fails is noted in ``lost`` at once, or raised where that is None."""

        async def ask(replica: Replica, question: Any) -> None:
            try:
                await replica.reach().transfer(phase, question, self.timeout_s)
            except (Away, EngineError) as exc:
                if lost is None:
                    raise
                lost.setdefault(replica.name, f"{phase}: {exc}")

        self._wait(_all(map(ask, self.replicas, questions)))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.wait(work, self.timeout_s + _SLACK_S)


async def _all(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*asked))


def nccl_trainer(client: Any, stream: WeightStream, host: str, port: int, size: int, packed: bool = True) -> Trainer:
    """The sender of vLLM's ``nccl`` transfer; ``packed`` sends many tensors at once, from GPU memory."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Source(WeightSource):  # type: ignore[misc]  # vLLM is not typed for us
        def metadata(self) -> list[Any]:
            return [ParamMeta(*shape) for shape in stream.shapes()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(stream)

    # Every rank that sends does so to servers of its own, so each is the first rank of its transfer.
    info = NCCLTrainerInitInfo(host, port, size, packed, rank=0)
    made: Trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
    return made


def _own_host(replicas: Sequence[Replica]) -> str:
    """An address of this machine that every server can reach."""
    hosts = []
    for replica in replicas:
        place = replica.reach().address
        with socket.create_connection((place.host, place.port), timeout=10) as probe:
            hosts.append(str(probe.getsockname()[0]))
    return next((host for host in hosts if not host.startswith("127.") and host != "::1"), hosts[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
