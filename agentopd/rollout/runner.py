"""Many episodes at once: one coroutine each, and a barrier that turns their requests into one batch."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Literal, TypeVar

from agentopd.contracts import Engine, Generation, GenerationRequest, SamplingParams
from agentopd.errors import EngineError
from agentopd.rendering.templates import ChatRenderer
from agentopd.rollout.episode import Act, EpisodeRun, EpisodeSpec, RolloutOptions
from agentopd.types import Episode, Message, ToolSchema

T = TypeVar("T")
_DEFAULTS = RolloutOptions()


async def run_episodes(
    specs: Sequence[EpisodeSpec], engine: Engine, renderer: ChatRenderer, options: RolloutOptions = _DEFAULTS
) -> list[Episode]:
    """Play every episode with the student; finished records in the order of ``specs``.

    Under one set of weights the tokens depend on the specs alone (an engine with ``lockstep``; others as far as their
    batching repeats). Raises ``EngineError`` when the engine fails; environment faults are episodes, not exceptions.
    """

    async def keep(spec: EpisodeSpec, episode: Episode) -> Episode:
        return episode

    return await stream_episodes(specs, engine, renderer, keep, options)


async def stream_episodes(
    specs: Sequence[EpisodeSpec],
    engine: Engine,
    renderer: ChatRenderer,
    on_finished: Callable[[EpisodeSpec, Episode], Awaitable[T]],
    options: RolloutOptions = _DEFAULTS,
) -> list[T]:
    """Like ``run_episodes``, handing each episode to ``on_finished`` as soon as it ends, while others still sample.

    Returns what ``on_finished`` returned, in the order of ``specs``. An exception there or in the engine cancels the
    rest and is raised; every environment is closed first.
    """
    queue = Admission([spec.skill for spec in specs], options.max_live)
    lanes = _lanes(specs, engine, options, queue)

    async def one(index: int, spec: EpisodeSpec) -> T:
        source = lanes[_lane(spec, options)]
        await queue.admitted(index)
        try:
            episode = await EpisodeRun(spec, _Student(index, spec, source, renderer, options), options).play()
        finally:
            if (successor := queue.leave(index)) is not None:
                source.join(successor)
            source.leave(index)
        return await on_finished(spec, episode)

    try:
        return await _all_or_nothing([one(index, spec) for index, spec in enumerate(specs)])
    finally:
        for source in lanes.values():
            await source.drain()


class Admission:
    """Who may play: ``max_live`` episodes of a skill at once, in order, each leaver admitting the next."""

    def __init__(self, skills: Sequence[str], max_live: Mapping[str, int]) -> None:
        self._skills = skills
        self._waiting: dict[str, deque[int]] = defaultdict(deque)
        self._gates = [asyncio.Event() for _ in skills]
        self.live: set[int] = set()
        counts: Counter[str] = Counter()
        for index, skill in enumerate(skills):
            counts[skill] += 1
            if counts[skill] <= max_live.get(skill, len(skills)):
                self._admit(index)
            else:
                self._waiting[skill].append(index)

    async def admitted(self, index: int) -> None:
        """Wait for one's turn."""
        await self._gates[index].wait()

    def leave(self, index: int) -> int | None:
        """Make room; returns who takes it."""
        self.live.discard(index)
        queue = self._waiting[self._skills[index]]
        if not queue:
            return None
        self._admit(successor := queue.popleft())
        return successor

    def _admit(self, index: int) -> None:
        self.live.add(index)
        self._gates[index].set()


def _lane(spec: EpisodeSpec, options: RolloutOptions) -> str:
    return spec.skill if spec.skill in options.own_batches else ""


def _lanes(
    specs: Sequence[EpisodeSpec], engine: Engine, options: RolloutOptions, queue: Admission
) -> dict[str, _Lockstep | _Direct]:
    """Where episodes get their turns: one barrier for all, and one for each skill with batches of its own."""
    members: dict[str, set[int]] = defaultdict(set)
    for index, spec in enumerate(specs):
        members[_lane(spec, options)] |= {index} & queue.live
    return {name: _Lockstep(engine, live) if engine.lockstep else _Direct(engine) for name, live in members.items()}


class _Student:
    """The actor that samples its turns from the engine."""

    def __init__(
        self,
        index: int,
        spec: EpisodeSpec,
        source: _Lockstep | _Direct,
        renderer: ChatRenderer,
        options: RolloutOptions,
    ) -> None:
        self.codec = renderer.codec
        self.max_context = source.engine.max_context
        self._session = f"{index}/{spec.id}"
        self._index, self._seed, self._source, self._renderer, self._options = (
            index,
            spec.seed,
            source,
            renderer,
            options,
        )

    def open(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        return self._renderer.open(messages, tools)

    def observe(self, messages: Sequence[Message]) -> list[int]:
        return self._renderer.observe(messages)

    async def act(self, turn: int, token_ids: Sequence[int], room: int) -> Act:
        params = SamplingParams(self._options.temperature, self._options.top_p, room, self._renderer.end_of_turn_ids)
        request = GenerationRequest(tuple(token_ids), params, turn_seed(self._seed, turn), self._session)
        made = await self._source.generate(self._index, request)
        text = self._renderer.decode_turn(made.token_ids)
        stopped = made.finish_reason == "stop"
        ends = self._renderer.token_ends(made.token_ids, text)
        reason: Literal["stop", "length"] = "stop" if stopped else "length"
        return Act(text, made.token_ids, made.logprobs, reason, made.weight_version, ends, made.updates)


class _Direct:
    """Every request goes to the engine on its own; the engine batches."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def generate(self, index: int, request: GenerationRequest) -> Generation:
        return (await self.engine.generate([request]))[0]

    def join(self, index: int) -> None:
        pass

    def leave(self, index: int) -> None:
        pass

    async def drain(self) -> None:
        pass


class _Lockstep:
    """A barrier: the engine is called once every live episode has asked, with the requests in episode order.

    Who asks first does not matter, so batches, and with them the sampled tokens, repeat exactly.
    """

    def __init__(self, engine: Engine, members: set[int]) -> None:
        self.engine = engine
        self._live = members
        self._waiting: dict[int, tuple[GenerationRequest, asyncio.Future[Generation]]] = {}
        self._call: asyncio.Task[None] | None = None

    async def generate(self, index: int, request: GenerationRequest) -> Generation:
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting[index] = (request, future)
        self._maybe_call()
        return await future

    async def drain(self) -> None:
        """Wait for a call that outlived its episodes: weights must not change under it."""
        if self._call is not None:
            await self._call

    def join(self, index: int) -> None:
        self._live.add(index)

    def leave(self, index: int) -> None:
        self._live.discard(index)
        self._waiting.pop(index, None)
        self._maybe_call()

    def _maybe_call(self) -> None:
        if self._live and len(self._waiting) == len(self._live):
            batch = [self._waiting[index] for index in sorted(self._waiting)]
            self._waiting = {}
            self._call = asyncio.get_running_loop().create_task(self._generate(batch))

    async def _generate(self, batch: list[tuple[GenerationRequest, asyncio.Future[Generation]]]) -> None:
        batch = [(request, future) for request, future in batch if not future.cancelled()]
        try:
            made = await self.engine.generate([request for request, _ in batch]) if batch else []
            if len(made) != len(batch):
                raise EngineError(f"the engine returned {len(made)} generations for {len(batch)} requests")
        except Exception as exc:
            for _, future in batch:
                if not future.done():
                    future.set_exception(exc)
            return
        for (_, future), generation in zip(batch, made, strict=True):
            if not future.done():
                future.set_result(generation)


def turn_seed(seed: int, turn: int) -> int:
    """The sampling seed of one turn: a 64-bit hash, so that neighbouring episodes and turns share nothing."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest(), "big")


async def _all_or_nothing(coroutines: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """Results in order; the first exception cancels the others, waits for them to clean up, and is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
