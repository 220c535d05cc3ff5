"""Students on other machines: each Ray actor samples from a copy of the weights with the in-process engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from agentopd.attention import ATTENTION
from agentopd.config.run import RolloutConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines import HFEngine
from agentopd.errors import EngineError
from agentopd.models import default_device
from agentopd.scaleout.pool import ActorPool, Placement, connect
from agentopd.weights import full_weights


class RolloutWorker:
    """What runs there: a model of the student's shape. Weights come with the first request that needs them."""

    def __init__(self, model_config: Any, dtype: torch.dtype, batch_size: int, turn_cache_mb: int) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=ATTENTION)
        self._model = model.eval().to(default_device())
        self._engine = HFEngine(self._model, batch_size, turn_cache_mb=turn_cache_mb)
        self._push = 0
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Nothing more to do."""

    async def ping(self) -> None:
        """It lives."""

    async def generate(self, push: int, version: int, weights: Sequence[Any], requests: list[GenerationRequest]) -> Any:
        """Continuations in order; ``weights`` holds the reference to those of ``push``, which go by ``version``.

        A guard that rolls back pushes other weights under the version of those it discards.
        """
        async with self._turn:
            if push != self._push:
                self._model.load_state_dict(await weights[0], strict=False)
                self._engine.sync_weights(version)
                self._push = push
            return await self._engine.generate(requests)

    async def aclose(self) -> None:
        """Stop the engine's thread."""
        await self._engine.aclose()


class RayEngine:
    """An ``Engine`` that divides each batch among rollout workers; an episode stays with the worker that has its turns.

    A sample depends on its request alone, so workers change nothing but rounding. Weights are put into Ray's object
    store once an update; a worker fetches them when it is next asked. Raises ``EngineError`` where worker after worker
    is lost.
    """

    lockstep = True

    def __init__(self, model: Any, rollout: RolloutConfig, config: RayConfig) -> None:
        self.max_context = HFEngine(model).max_context
        self.weight_version = 0
        self._model, self._count = model, config.rollout_workers
        self._ray = connect(config)
        placement = Placement(config.rollout_workers, config.rollout_resource, config.gpus_per_rollout_worker)
        arguments = (model.config, next(model.parameters()).dtype, rollout.batch_size, rollout.turn_cache_mb)
        self._pool = ActorPool(RolloutWorker, arguments, placement, config, EngineError)
        self._homes: dict[str, int] = {}
        self._pushes = 1
        self._weights = self._put()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One continuation per request, in order."""
        current = (self._pushes, self.weight_version, [self._weights])
        shares = self._shared_out(requests)
        answers = await asyncio.gather(
            *(
                self._pool.call("generate", *current, [requests[i] for i in members], home=home)
                for home, members in shares.items()
            )
        )
        made: dict[int, Generation] = {}
        for members, answer in zip(shares.values(), answers, strict=True):
            made.update(zip(members, answer, strict=True))
        return [made[index] for index in range(len(requests))]

    def updating(self) -> AbstractContextManager[object]:
        """Nothing to hold back: workers sample from weights of their own."""
        return nullcontext()

    def sync_weights(self, version: int) -> dict[str, float]:
        """Put the learner's weights where workers fetch them; requests from here on are sampled from these."""
        self._weights = self._put()
        self._pushes += 1
        self.weight_version = version
        self._homes.clear()
        return {}

    def sleep(self) -> None:
        """Episodes are over: the next ones are dealt out anew."""
        self._homes.clear()

    async def aclose(self) -> None:
        """End the workers."""
        await self._pool.aclose()

    def _put(self) -> Any:
        return self._ray.put({name: weight.detach().cpu() for name, weight in full_weights(self._model)})

    def _shared_out(self, requests: Sequence[GenerationRequest]) -> dict[int, list[int]]:
        """Indices of the requests by worker: known episodes where they were, new ones where there are fewest."""
        shares: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.session in self._homes:
                shares[self._homes[request.session]].append(index)
        for index, request in enumerate(requests):
            if request.session not in self._homes:
                home = min(range(self._count), key=lambda worker: len(shares[worker]))
                shares[home].append(index)
                if request.session:
                    self._homes[request.session] = home
        return {home: members for home, members in shares.items() if members}
