"""Interchangeable Ray actors: a call goes to the least busy one that lives, and again to another if that one is lost.

A worker is lost when its process or machine dies, when it misses the deadline of a call, or when it does not answer a
health check; it is killed where it can still be reached, and another is started in its place. Calls must be such that
doing one twice changes nothing. What a worker raises itself is handed on as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agentopd.config.scaleout import RayConfig
from agentopd.errors import ConfigError, InfraError

_POLL_S = 0.05


@dataclass(frozen=True)
class Placement:
    """How many workers there are, and what Ray sets aside for each."""

    count: int
    resource: str | None
    gpus: float = 0.0


@dataclass
class _Slot:
    actor: Any
    ready: Future[Any]
    busy: int = 0

    @property
    def alive(self) -> bool:
        """It has started, and was not found to be lost."""
        return self.ready.done() and self.ready.exception() is None


class _Lost(Exception):
    """The worker is gone, or as good as gone."""


class _Slow(Exception):
    """It took longer than it was given."""


class ActorPool:
    """Workers of class ``body``, made with ``arguments`` on whatever machines have room.

    ``body`` has the coroutines ``start``, ``ping`` and ``aclose``. Faults of the cluster raise ``error``. Nothing here
    belongs to an event loop: calls may come from several.
    """

    def __init__(
        self, body: type, arguments: Sequence[Any], placement: Placement, config: RayConfig, error: type[InfraError]
    ) -> None:
        self._ray = connect(config)
        self._config, self._placement, self._error, self._arguments = config, placement, error, arguments
        resources = {placement.resource: 1.0} if placement.resource else None
        self._class = self._ray.remote(body).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=placement.gpus,
            resources=resources,
            max_restarts=0,
        )
        self._slots: list[_Slot] = []
        self.replaced = 0
        """Workers lost so far."""

    async def start(self) -> list[Any]:
        """Start every worker; what each one's ``start`` returned. Idempotent. Raises the pool's error."""
        while len(self._slots) < self._placement.count:
            self._slots.append(self._new())
        return [await self._started(slot) for slot in list(self._slots)]

    async def call(self, method: str, *arguments: Any, home: int | None = None) -> Any:
        """The result of a coroutine method on one worker, ``home`` (an index) if that one lives."""
        if not self._slots:
            await self.start()
        faults: list[str] = []
        while len(faults) < self._config.attempts:
            slot = await self._alive(home)
            slot.busy += 1
            try:
                return await self._result(slot, method, arguments)
            except _Lost as exc:
                faults.append(str(exc))
                self._replace(slot)
            finally:
                slot.busy -= 1
        raise self._error(f"{len(faults)} workers were lost over {method!r}: {faults[-1]}")

    async def aclose(self) -> None:
        """End all workers; idempotent."""
        slots, self._slots = self._slots, []
        for slot in slots:
            if slot.alive:
                with suppress(Exception):  # whatever became of it, it is killed next
                    await _within(slot.actor.aclose.remote().future(), self._config.health_s)
            self._ray.kill(slot.actor)

    def _new(self) -> _Slot:
        actor = self._class.remote(*self._arguments)
        return _Slot(actor, actor.start.remote().future())

    async def _started(self, slot: _Slot) -> Any:
        try:
            return await _within(slot.ready, self._config.deadline_s)
        except _Slow:
            wanted = f" with resource {self._placement.resource!r}" if self._placement.resource else ""
            room = f"no machine of the cluster had room{wanted} within {self._config.deadline_s:g} s"
            raise self._error(f"starting a worker: {room}") from None
        except Exception as exc:
            raise self._translated(exc) from None

    async def _alive(self, home: int | None) -> _Slot:
        """The worker to ask; waits for one that is being started. Raises the pool's error where none comes up."""
        give_up = time.monotonic() + self._config.deadline_s
        while True:
            if home is not None and self._slots[home % len(self._slots)].alive:
                return self._slots[home % len(self._slots)]
            if alive := [slot for slot in self._slots if slot.alive]:
                return min(alive, key=lambda slot: slot.busy)
            if all(slot.ready.done() for slot in self._slots):
                raise self._translated(self._slots[0].ready.exception() or InfraError("no worker"))
            if time.monotonic() > give_up:
                raise self._error(f"no worker came up within {self._config.deadline_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _result(self, slot: _Slot, method: str, arguments: Sequence[Any]) -> Any:
        """What the call returns, asking on the way whether the worker lives. Raises ``_Lost``."""
        future = getattr(slot.actor, method).remote(*arguments).future()
        give_up = time.monotonic() + self._config.deadline_s
        while True:
            try:
                return await _within(future, self._config.health_s)
            except _Slow:
                if time.monotonic() > give_up:
                    raise _Lost(f"no answer within {self._config.deadline_s:g} s") from None
                await self._check(slot)
            except Exception as exc:
                if self._is_loss(exc):
                    raise _Lost(str(exc).strip().splitlines()[0]) from None
                raise self._translated(exc) from None

    async def _check(self, slot: _Slot) -> None:
        try:
            await _within(slot.actor.ping.remote().future(), self._config.health_s)
        except Exception:
            raise _Lost(f"no answer to a health check within {self._config.health_s:g} s") from None

    def _replace(self, slot: _Slot) -> None:
        """Once, however many calls were lost with it."""
        if slot not in self._slots:
            return
        self.replaced += 1
        self._ray.kill(slot.actor)
        self._slots[self._slots.index(slot)] = self._new()

    def _is_loss(self, exc: BaseException) -> bool:
        faults = self._ray.exceptions
        return isinstance(exc, faults.RayError) and not isinstance(exc, faults.RayTaskError)

    def _translated(self, exc: BaseException) -> BaseException:
        """The worker's own exception, or a fault of the cluster as the pool's error."""
        if isinstance(exc, self._ray.exceptions.RayTaskError):
            return exc.cause  # type: ignore[no-any-return]
        return self._error(f"{type(exc).__name__}: {exc}") if self._is_loss(exc) else exc


def connect(config: RayConfig) -> Any:
    """The ``ray`` module, connected. Raises ``ConfigError`` where it is not installed or there is no cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("[ray] needs Ray: pip install 'agentopd[ray]', or leave the section out") from None
    if not ray.is_initialized():
        try:
            ray.init(
                address=config.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if config.address else False,
            )
        except ConnectionError as exc:
            raise ConfigError(f"ray.address {config.address!r}: {exc}; start Ray there, or leave it out") from None
    return ray


async def _within(future: Future[Any], seconds: float) -> Any:
    """The future's result. Raises ``_Slow`` if it takes longer, and leaves it alone."""
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to ask
    done, _ = await asyncio.wait({waiting}, timeout=seconds)
    if not done:
        raise _Slow
    return waiting.result()
