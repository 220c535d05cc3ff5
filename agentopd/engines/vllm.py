"""vLLM beside the learner: continuous batching in a process of its own, fed token ids.

Its ``AsyncLLM`` lives on an event loop in a background thread, so that callers may come from any loop or from none.
The keys and values of earlier turns are found by vLLM's prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count
from typing import Any

from agentopd.config.engines import VLLMConfig
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines.background import Gate
from agentopd.engines.canary import Canary
from agentopd.engines.pieces import CUT, in_pieces
from agentopd.engines.requests import check_finite, check_fits, context_limit
from agentopd.engines.vllm_process import (
    KEYS,
    blaming_the_cache,
    require_vllm,
    sampler_args,
    sampling_args,
    start,
)
from agentopd.engines.weight_sync import DiskSync, TransferSync, WeightSync
from agentopd.errors import ConfigError, EngineError, boundary


class VLLMEngine:
    """Samples from a copy of ``model`` (the learner's own Hugging Face model) that ``sync_weights`` brings up to date.

    With ``cut_turns`` an update does not wait for the turns under way, which go on after it from the new weights.
    Seeds belong to requests, but rounding depends on who shares a batch, so samples repeat as far as batches do.
    Raises ``ConfigError`` where vLLM is not installed, and ``EngineError`` for what fails later.
    """

    lockstep = False

    def __init__(self, model: Any, config: VLLMConfig, cut_turns: bool = False) -> None:
        require_vllm()
        self.max_context = context_limit(model.config, config.max_context)
        self.weight_version = 0
        self._request_ids = count()
        device = next(model.parameters()).device
        self._on_gpu = device.type == "cuda"
        self._asleep = False
        self._turns = Gate()
        self._under_way: set[str] = set()
        self._cut: set[str] = set()
        """Names of requests, the latter of those that an update has cut."""
        self._cuts = cut_turns
        self._canary = Canary(model, self.max_context, config.canary_bound)
        if config.sync == "ipc" and not self._on_gpu:
            raise ConfigError("rollout.vllm.sync = 'ipc' shares GPU memory, and there is no GPU: use 'auto' or 'disk'")
        through_gpu = config.sync == "ipc" or (config.sync == "auto" and self._on_gpu)
        self._sync: WeightSync = TransferSync(model) if through_gpu else DiskSync(model)
        args = {**sampler_args(config, model.dtype, self.max_context), **self._sync.engine_args}
        if self._on_gpu:
            args["enable_sleep_mode"] = True
        with ExitStack() as started, boundary(EngineError, "starting vLLM"):
            started.callback(self._sync.close)
            with blaming_the_cache(model.config, args, KEYS):
                self._llm = start(args, config.timeout_s, device)
            started.callback(self._llm.close)
            self._check()
            self._started = started.pop_all()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One continuation per request, in order; cancelling the call aborts them in vLLM."""
        for request in requests:
            check_fits(request, self.max_context)
        if self._asleep:
            raise EngineError("vLLM sleeps and its weights are gone: call sync_weights first")
        with boundary(EngineError, "generating with vLLM"):
            return await self._llm.loop.run(self._generate(requests))

    def updating(self) -> AbstractContextManager[object]:
        """Nothing to hold back: vLLM samples from weights of its own."""
        return nullcontext()

    def sync_weights(self, version: int) -> dict[str, float]:
        """Push the learner's weights, forget what was cached under the old ones, and ask the canary.

        No turn is under way meanwhile, and new ones wait. Returns ``sync/canary``, the mean difference in nats. Raises
        ``EngineError`` above its bound.
        """
        with boundary(EngineError, f"bringing vLLM to weight version {version}"), self._between_turns():
            if self._asleep:
                self._llm.call("wake_up", ["weights"])
            self._sync.push(self._llm)
            if self._asleep:
                self._llm.call("wake_up", ["kv_cache"])
                self._asleep = False
            self._llm.call("reset_prefix_cache")
            self.weight_version = version
            return {"sync/canary": self._check()}

    def sleep(self) -> None:
        """Free vLLM's GPU memory until the next ``sync_weights``; nothing on a CPU, where vLLM cannot."""
        if self._on_gpu and not self._asleep:
            with boundary(EngineError, "putting vLLM to sleep"):
                self._llm.call("sleep", 2)
            self._asleep = True

    @property
    def unfinished(self) -> int:
        """Requests that vLLM still works on."""
        return int(self._llm.llm.get_num_unfinished_requests())

    async def aclose(self) -> None:
        """Stop vLLM's process and remove what the sync left on disk."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """``aclose`` for callers without an event loop."""
        self._started.close()

    @contextmanager
    def _between_turns(self) -> Iterator[None]:
        self._llm.wait(self._turns.close(self._cut_turns if self._cuts else None))
        try:
            yield
        finally:
            self._llm.wait(self._turns.open())

    async def _cut_turns(self) -> None:
        self._cut |= self._under_way
        await self._llm.llm.abort(list(self._under_way))

    def _check(self) -> float:
        async def sampled() -> list[Generation]:
            return list(await asyncio.gather(*map(self._one, self._canary.requests)))

        return self._canary.check(self._llm.wait(sampled()))

    async def _generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return list(await asyncio.gather(*(in_pieces(request, self._turns, self._one) for request in requests)))

    async def _one(self, request: GenerationRequest) -> Generation:
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
        name = str(next(self._request_ids))
        self._under_way.add(name)
        try:
            (final,) = [output async for output in self._llm.llm.generate(prompt, _sampling(request), name)]
            (made,) = final.outputs
            if made.finish_reason not in ("stop", "length", *([CUT] if name in self._cut else [])):
                raise EngineError(f"vLLM ended a request with {made.finish_reason!r}")
        finally:
            self._under_way.remove(name)
            self._cut.discard(name)
        check_finite(made.logprobs.logprobs)
        greedy = request.params.temperature == 0
        logprobs = (0.0,) * len(made.token_ids) if greedy else tuple(made.logprobs.logprobs)
        return Generation(tuple(made.token_ids), logprobs, made.finish_reason, self.weight_version)


def _sampling(request: GenerationRequest) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**sampling_args(request), flat_logprobs=True, output_kind=kind)
