"""Replicas behind HTTP: which one gets a request, and what happens to one that dies, hangs, or has other weights.

A replica that fails is out of the pool until it has been started again (or answers again, where somebody else runs it),
has the current weights, and has passed the canary. Its requests are asked of another, or of itself once it is back: a
fault of a server is never an answer. The pools of several ranks may share a replica: whoever meets it without the
current weights brings them, and the others see by their label that it has them, or that they are on their way.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from agentopd.config.engines import ServersConfig
from agentopd.contracts import GenerationRequest
from agentopd.engines.background import Gate
from agentopd.engines.http import Away
from agentopd.engines.pieces import CUT
from agentopd.engines.server_process import ServerProcess
from agentopd.engines.token_client import Sampled, TokenClient
from agentopd.engines.weight_folder import Weights
from agentopd.errors import EngineError, boundary

_LOG = logging.getLogger(__name__)
_TRIES, _SUSPECT = 5, 3
"""A request that so many servers fail on, one after the other, is itself at fault; it is suspected before."""
_STARTS = 3
"""A server of ours that does not come up so many times in a row never will."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LOOK_S = 0.2, 5.0, 1.0


@dataclass
class Replica:
    """One server of the pool. ``process`` is None where somebody else started it; ``client`` is None before a start."""

    name: str
    client: TokenClient | None
    process: ServerProcess | None = None
    under_way: set[str] = field(default_factory=set)
    """Names of the requests it works on."""
    life: int = 0
    """How often it came up."""
    is_up: bool = False
    fault: str = ""
    """Why it is not up, or is about to leave."""
    gone: bool = False
    """It will not come back."""
    brought_since: float | None = None
    """When another rank was first seen to bring it the current weights, by ``time.monotonic``."""
    faulty: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def turns(self) -> int:
        """How many requests it works on."""
        return len(self.under_way)

    def reach(self) -> TokenClient:
        """Its client. Raises ``Away`` where there is none yet."""
        if self.client is None:
            raise Away("it has not been started")
        return self.client


Check = Callable[[Replica], Awaitable[None]]


class Pool:
    """Keeps ``replicas`` up and gives out requests. Of one event loop, whose thread must live as long as the servers.

    ``check`` is asked about a replica that came back with the current weights, and raises ``EngineError`` where it does
    not sample from them. ``load_s`` is the deadline of a start, and of taking up weights.
    """

    def __init__(self, replicas: Sequence[Replica], config: ServersConfig, load_s: float, check: Check) -> None:
        self.replicas = replicas
        self._config = config
        self._load_s = load_s
        self._check = check
        self._cut: set[str] = set()
        """Names of the requests that ``cut`` was called on."""
        self._claimed: dict[str, int] = {}
        """The lives in which replicas were claimed."""
        self._weights: Weights | None = None
        self._name = uuid.uuid4().hex[:8]
        self._loads = Gate()
        self._homes: dict[str, Replica] = {}
        self._changed = asyncio.Event()
        self._suspects = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, weights: Weights, replicas: Sequence[Replica]) -> None:
        """Bring some of the replicas up with ``weights``. Raises ``EngineError`` where one does not come."""
        self._weights = weights
        self._tasks += [asyncio.create_task(self._look_after(replica)) for replica in replicas]
        while not all(replica.is_up for replica in replicas):
            for replica in replicas:
                if replica.gone:
                    raise EngineError(f"{replica.name} does not start: {replica.fault}")
            await self._changed.wait()

    async def sample(self, request: GenerationRequest) -> Sampled:
        """One continuation, by whichever replica can. Raises ``EngineError`` for a request that none can answer."""
        for tries in range(_TRIES):
            # What kills servers takes its neighbours' turns along: who met that often is asked one at a time.
            async with self._suspects if tries >= _SUSPECT else nullcontext():
                replica = await self._pick(request.session)
                life, failed = replica.life, ""
                try:
                    return await self.sample_on(replica, request)
                except Away as exc:
                    failed = str(exc)
                    self.blame(replica, life, failed)
        raise EngineError(f"a request of {len(request.token_ids)} tokens failed on {_TRIES} servers: {failed}")

    async def sample_on(self, replica: Replica, request: GenerationRequest, timeout_s: float | None = None) -> Sampled:
        """One continuation by one replica, within the deadline of a turn if no other is given.

        Raises ``Away`` where it fails, or has other weights than the pool's.
        """
        name = uuid.uuid4().hex
        replica.under_way.add(name)
        try:
            made = await replica.reach().sample(request, name, timeout_s or self._config.turn_timeout_s)
            if made.finish_reason == CUT and name not in self._cut:
                raise Away("it ended a request that nobody cut")
        finally:
            replica.under_way.remove(name)
            self._cut.discard(name)
        if self._weights is not None and made.versions - {self._weights.version}:
            raise Away(f"it sampled from other weights ({', '.join(sorted(made.versions))})")
        return made

    async def cut(self) -> None:
        """End the requests under way where they are; those of a replica that cannot be told end by its fault."""

        async def one(replica: Replica) -> None:
            self._cut |= replica.under_way
            with suppress(Away):
                await replica.reach().cut(replica.under_way)

        await asyncio.gather(*map(one, self.replicas))

    async def hold(self) -> None:
        """Bring nobody the weights that are about to be old, and wait for who is being brought them."""
        await self._loads.close()

    async def release(self) -> None:
        """End ``hold``."""
        await self._loads.open()

    async def claim(self, weights: Weights, replicas: Sequence[Replica]) -> list[Replica]:
        """Label ``replicas`` as being brought the ``weights`` past the folder, under ``hold``; those who could be."""
        self._claimed = {replica.name: replica.life for replica in replicas}
        await self._each(replicas, lambda x: x.reach().name(self._claim(weights), self._load_s))
        return [replica for replica in replicas if replica.is_up]

    async def settle(self, weights: Weights, replicas: Sequence[Replica], lost: Mapping[str, str]) -> list[Replica]:
        """Label ``replicas`` as having the ``weights``; the ``lost`` and who fails leave, and the rest are returned.

        A server that was started again since it was claimed has not been sent them.
        """
        same = [x for x in replicas if x.is_up and x.life == self._claimed[x.name]]

        async def one(replica: Replica) -> None:
            if replica.name in lost:
                raise Away(lost[replica.name])
            await replica.reach().settle(weights.version, self._load_s)

        await self._each(same, one)
        return [replica for replica in same if replica.is_up]

    async def _each(self, replicas: Sequence[Replica], ask: Callable[[Replica], Awaitable[None]]) -> None:
        async def one(replica: Replica) -> None:
            life = replica.life
            try:
                await ask(replica)
            except Away as exc:
                self.blame(replica, life, str(exc))

        await asyncio.gather(*map(one, replicas))

    async def load(self, weights: Weights, replicas: Sequence[Replica]) -> None:
        """Give ``replicas`` that are up the ``weights``, which other ranks give to the rest; ends ``hold``.

        What is down gets them when it is back. Waits until a replica is up.
        """
        self._weights = weights
        self._homes.clear()
        await self.release()
        await self._each([x for x in replicas if x.is_up], lambda replica: self._load(replica, weights))
        await self.some_up()

    @property
    def up(self) -> list[Replica]:
        """The replicas that can be asked."""
        return [replica for replica in self.replicas if replica.is_up]

    async def some_up(self) -> list[Replica]:
        """The replicas that can be asked; waits until there is one. Raises ``EngineError`` after ``outage_s``."""
        try:
            async with asyncio.timeout(self._config.outage_s):
                while not self.up:
                    if all(replica.gone for replica in self.replicas):
                        raise EngineError(f"no server is left; {self._faults()}")
                    await self._changed.wait()
        except TimeoutError:
            raise EngineError(f"no server for {self._config.outage_s:g} s; {self._faults()}") from None
        return self.up

    async def close(self) -> None:
        """Stop looking after the replicas, and end those that were started here."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        processes = [replica.process for replica in self.replicas if replica.process is not None]
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in processes))

    async def _load(self, replica: Replica, weights: Weights) -> None:
        await weights.at_hand(self._load_s)
        await replica.reach().load(weights.path, weights.version, self._load_s, self._claim(weights))

    def _claim(self, weights: Weights) -> str:
        return f"{_bringing(weights)}{self._name}"

    async def _bring_weights(self, replica: Replica) -> Weights:
        """The weights that it has now. Raises ``Away`` while another rank brings them."""
        async with self._loads:
            assert self._weights is not None
            weights = self._weights
            found = await replica.reach().version()
            if found.startswith(_bringing(weights)) and not found.endswith(self._name):
                replica.brought_since = replica.brought_since or time.monotonic()
                if time.monotonic() - replica.brought_since < self._load_s:
                    raise Away("another rank brings it the weights")
            if found != weights.version:
                await self._load(replica, weights)
            return weights

    async def _pick(self, session: str) -> Replica:
        """The replica for a request."""
        up = await self.some_up()
        home = self._homes.get(session)
        if home is None or not home.is_up:
            home = min(up, key=lambda replica: replica.turns)
            if session and self._config.routing == "session":
                self._homes[session] = home
        return home

    def _faults(self) -> str:
        return "; ".join(f"{replica.name}: {replica.fault}" for replica in self.replicas)

    def blame(self, replica: Replica, life: int, why: str) -> None:
        """Take a replica out of the pool for what it did in its life number ``life``."""
        if replica.is_up and replica.life == life:
            replica.is_up, replica.fault = False, why
            replica.faulty.set()
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _look_after(self, replica: Replica) -> None:
        """Bring a replica up, wait until it fails, and so on, until it cannot be brought back."""
        try:
            while True:
                with boundary(EngineError, f"bringing {replica.name} up"):
                    await self._bring_up(replica)
                while not replica.faulty.is_set():
                    self._notice_death(replica)
                    await _wait(replica.faulty, _LOOK_S)
                _LOG.warning("%s failed (%s): its requests are asked again", replica.name, replica.fault)
        except EngineError as exc:
            replica.fault, replica.gone = str(exc), True
            _LOG.warning("%s is given up: %s", replica.name, exc)
            self._announce()

    def _notice_death(self, replica: Replica) -> None:
        if replica.process is not None and (code := replica.process.exit_code) is not None:
            self.blame(replica, replica.life, f"it ended with exit code {code}")

    async def _bring_up(self, replica: Replica) -> None:
        """Raises ``EngineError`` where it cannot be done, or not in time."""
        began, pause, starts = time.monotonic(), _FIRST_PAUSE_S, 0
        while True:
            try:
                starts += 1
                await self._try_up(replica)
            except Away as exc:
                replica.fault = str(exc)
                away = time.monotonic() - began
                if away + pause > self._config.outage_s or (replica.process is not None and starts == _STARTS):
                    raise EngineError(f"{exc}, after {away:.0f} s and {starts} tries") from None
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if replica.life:
                    _LOG.warning("%s is back after %.0f s", replica.name, time.monotonic() - began)
                replica.life, replica.is_up, replica.fault = replica.life + 1, True, ""
                replica.brought_since = None
                replica.faulty.clear()
                self._announce()
                return

    async def _try_up(self, replica: Replica) -> None:
        if replica.process is not None:
            await self._restart(replica, replica.process)
        await replica.reach().alive()
        weights = None
        while weights is not self._weights:  # others may have come meanwhile
            weights = await self._bring_weights(replica)
            await self._check(replica)

    async def _restart(self, replica: Replica, process: ServerProcess) -> None:
        weights = self._weights
        assert weights is not None
        process.kill()
        await weights.at_hand(self._load_s)  # newer ones, which may come meanwhile, are brought when it is up
        replica.client = TokenClient(process.start(weights.path))
        try:
            async with asyncio.timeout(self._load_s):
                while True:
                    if (code := process.exit_code) is not None:
                        raise Away(f"it ended with exit code {code} while it started: {process.last_words()}")
                    try:
                        await replica.client.alive()
                        return
                    except Away:
                        await asyncio.sleep(_FIRST_PAUSE_S)
        except TimeoutError:
            raise Away(f"it did not start within {self._load_s:g} s: {process.last_words()}") from None


def _bringing(weights: Weights) -> str:
    """How the label of a replica begins while somebody, whose name follows, gives it the weights."""
    return f"{weights.version}, brought by "


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
