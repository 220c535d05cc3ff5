"""Students on other machines: each Ray actor samples from a copy of the weights with the in-process engine."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from agentopd.attention import ATTENTION
from agentopd.config.run import RolloutConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines import HFEngine
from agentopd.engines.canary import Canary
from agentopd.errors import EngineError, boundary
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

    async def generate(
        self,
        push: int,
        version: int,
        weights: Sequence[Any],
        canary: list[GenerationRequest],
        requests: list[GenerationRequest],
    ) -> tuple[list[Generation] | None, list[Generation]]:
        """Continuations in order; ``weights`` holds the reference to those of ``push``, which go by ``version``.

        Those of ``canary`` come first, None where it was asked under these weights before. A guard that rolls back
        pushes other weights under the version of those it discards. Raises ``EngineError`` where weights do not fit.
        """
        async with self._turn:
            if push == self._push:
                return None, await self._engine.generate(requests)
            load_whole(self._model, await weights[0])
            self._engine.sync_weights(version)
            self._push = push
            return await self._engine.generate(canary), await self._engine.generate(requests)

    async def aclose(self) -> None:
        """Stop the engine's thread."""
        await self._engine.aclose()


def load_whole(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give ``model`` all of its weights; those tied to one that is there need not be.

    Raises ``EngineError`` naming what is missing or unknown, before anything changes.
    """
    own = model.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights if name in own}
    missing = [name for name, weight in own.items() if name not in weights and id(weight) not in given]
    unknown = [name for name in weights if name not in own]
    if missing or unknown:
        raise EngineError(
            f"the learner's weights are not those of the worker's model: missing {missing[:3]}, unknown {unknown[:3]}; "
            "install the same versions of agentopd and transformers on every machine"
        )
    with boundary(EngineError, "loading the learner's weights"):
        model.load_state_dict(weights, strict=False)


class RayEngine:
    """An ``Engine`` that divides each batch among rollout workers; an episode stays with the worker that has its turns.

    A sample depends on its request alone, so workers change nothing but rounding. Weights are put into Ray's object
    store once an update; a worker fetches them when it is next asked, and answers the canary with its first turns.
    Raises ``EngineError`` where worker after worker is lost, and where one does not sample from the learner's weights.
    """

    lockstep = True

    def __init__(self, model: Any, rollout: RolloutConfig, config: RayConfig) -> None:
        self._here = HFEngine(model, turn_cache_mb=0)
        self.max_context = self._here.max_context
        self.weight_version = 0
        self._bound = config.canary_bound
        self._model, self._count = model, config.rollout_workers
        self._ray = connect(config)
        placement = Placement(config.rollout_workers, config.rollout_resource, config.gpus_per_rollout_worker)
        arguments = (model.config, next(model.parameters()).dtype, rollout.batch_size, rollout.turn_cache_mb)
        self._pool = ActorPool(RolloutWorker, arguments, placement, config, EngineError)
        self._homes: dict[str, int] = {}
        self._pushes = 0
        self._push()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One continuation per request, in order."""
        canary = self._canary
        current = (self._pushes, self.weight_version, [self._weights], canary.requests)
        shares = self._shared_out(requests)
        answers = await asyncio.gather(
            *(
                self._pool.call("generate", *current, [requests[i] for i in members], home=home)
                for home, members in shares.items()
            )
        )
        made: dict[int, Generation] = {}
        for members, (sampled, answer) in zip(shares.values(), answers, strict=True):
            if sampled is not None:
                canary.check_again(sampled)
            made.update(zip(members, answer, strict=True))
        return [made[index] for index in range(len(requests))]

    def updating(self) -> AbstractContextManager[object]:
        """Nothing to hold back: workers sample from weights of their own."""
        return nullcontext()

    def sync_weights(self, version: int) -> dict[str, float]:
        """Put the learner's weights where workers fetch them; requests from here on are sampled from these."""
        self.weight_version = version
        self._push()
        self._homes.clear()
        return {}

    def sleep(self) -> None:
        """Episodes are over: the next ones are dealt out anew."""
        self._homes.clear()

    async def aclose(self) -> None:
        """End the workers."""
        await self._pool.aclose()
        await self._here.aclose()

    def _push(self) -> None:
        """Leave the weights where workers fetch them, and settle what the canary must say under them.

        A canary for each push: turns of the last one may still be under way.
        """
        kept = self._model.state_dict()
        buffers = {name: buffer for name, buffer in self._model.named_buffers() if name in kept}
        weights = {**buffers, **dict(full_weights(self._model))}
        self._weights = self._ray.put({name: weight.detach().cpu() for name, weight in weights.items()})
        self._pushes += 1
        self._canary = Canary(self._model, self.max_context, self._bound)
        self._canary.check(self._here.generate_now(self._canary.requests))

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
