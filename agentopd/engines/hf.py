"""The in-process engine: batched decoding of a Hugging Face causal model that the learner owns.

Prompts are packed for the prefill, every shared beginning (the copies of a group, a common system message) once, and
their keys and values then laid out row by row, padded on the right. The last prompt token goes through the decode
step, so that the prefill needs no logits. Rows that finish leave the batch in bulk. What a turn computed is kept for
the episode's next one, which then prefills only the tool results in between; a model that cannot be packed prefills its
whole prompt every turn.

Shapes: B rows, L padded length of the tokens to prefill, T cache columns, V vocabulary.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from agentopd.attention import ATTENTION
from agentopd.contracts import Generation, GenerationRequest
from agentopd.engines.cache import TurnCache, caching, empty_cache, joined, read_row
from agentopd.engines.pieces import CUT, Pieces
from agentopd.engines.requests import check_finite, check_fits, context_limit
from agentopd.engines.sampling import UniformStreams, sample
from agentopd.errors import EngineError, boundary
from agentopd.learner.body import packed_states, packs
from agentopd.packing import pack

_COMPACT_BELOW = 0.85
"""Finished rows are dropped once fewer than this share is alive: copying the cache costs more than a few idle rows."""


class HFEngine:
    """Samples from ``model`` itself: the weights are the learner's, so there is nothing to copy.

    ``model`` is a Hugging Face causal language model; ``batch_size`` rows are decoded at once, sorted by
    length; ``turn_cache_mb`` bounds the memory for keys and values kept between turns (0: every turn prefills its whole
    prompt). Calls run in one worker thread, one at a time, and never while the weights are ``updating``, which waits
    for the call under way, or with ``cut_turns`` for one token of it.
    Raises ``EngineError`` for requests that do not fit ``max_context`` and for non-finite log-probs.
    """

    lockstep = True

    def __init__(
        self,
        model: Any,
        batch_size: int = 256,
        max_context: int | None = None,
        turn_cache_mb: int = 1024,
        cut_turns: bool = False,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.max_context = context_limit(model.config, max_context)
        self.weight_version = 0
        self.turns = TurnCache(turn_cache_mb * 2**20)
        self._cuts = cut_turns
        self._weights = threading.Lock()
        self._no_update = threading.Event()
        self._no_update.set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf-engine")

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One continuation per request, in order; runs off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.generate_now, requests)

    def generate_now(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """``generate`` for callers without an event loop."""
        for request in requests:
            check_fits(request, self.max_context)
        turns = [Pieces(request) for request in requests]
        while waiting := [turn for turn in turns if not turn.is_whole]:
            self._no_update.wait()  # a lock goes to anybody, and the one who cut this has asked first
            with self._weights, boundary(EngineError, "generating"), _decoding(self.model):
                rest = [turn.rest for turn in waiting]
                for rows in self._chunks(rest):
                    for row, piece in zip(rows, self._decode([rest[row] for row in rows]), strict=True):
                        waiting[row].add(piece)
        return [turn.generation() for turn in turns]

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The weights are the learner's own: no turn is sampled while they change."""
        self._no_update.clear()
        try:
            with self._weights:
                yield
        finally:
            self._no_update.set()

    def sync_weights(self, version: int) -> dict[str, float]:
        """Nothing to copy; from here on generations carry ``version``, and nothing computed before it is used."""
        self.weight_version = version
        self.turns.clear()
        return {}

    def sleep(self) -> None:
        """Forget what was kept between turns."""
        self.turns.clear()

    async def aclose(self) -> None:
        """Stop the worker thread."""
        self._worker.shutdown(wait=True)

    def _chunks(self, requests: Sequence[GenerationRequest]) -> Iterator[list[int]]:
        """Indices of requests that decode together: one sampling distribution, similar lengths, a fixed order."""

        def kind(row: int) -> tuple[float, float, tuple[int, ...]]:
            params = requests[row].params
            return params.temperature, params.top_p, params.stop_ids

        order = sorted(range(len(requests)), key=lambda row: (kind(row), len(requests[row].token_ids), row))
        for _, group in groupby(order, key=kind):
            rows = list(group)
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _decode(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        if self._is_cut():
            return [Generation((), (), CUT) for _ in requests]
        batch = _Batch(self.model, requests, self.turns)
        while batch.alive and not self._is_cut():
            batch.step()
        return batch.results(self.weight_version)

    def _is_cut(self) -> bool:
        return self._cuts and not self._no_update.is_set()


class _Batch:
    """The state of one batch while it decodes. All requests share temperature, top-p and stop ids."""

    def __init__(self, model: Any, requests: Sequence[GenerationRequest], turns: TurnCache) -> None:
        self.model = model
        self.requests = requests
        self.turns = turns
        self.params = requests[0].params
        self.device = next(model.parameters()).device
        self.sampled: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.reasons: list[str] = [CUT] * len(requests)
        self.room = [request.params.max_tokens for request in requests]
        self.rows = list(range(len(requests)))
        """Which request each row of the batch belongs to; finished rows stay until the batch is compacted."""
        self.done = [False] * len(requests)
        self.alive = len(requests)
        self.uniforms = UniformStreams([x.seed for x in requests], [x.drawn for x in requests])
        self.stop_ids = frozenset(self.params.stop_ids)
        prompts = [tuple(request.token_ids) for request in requests]
        self.next_B = self._tensor([prompt[-1] for prompt in prompts])
        self.position_B = self._tensor([len(prompt) - 1 for prompt in prompts])
        self.packs = packs(model)
        self.columns = self.prefill_end = max(map(len, prompts)) - 1
        self.cache = self._prefilled(prompts)
        self.caching = caching(model, self.cache)
        self.mask_BT = self._mask(self.columns + max(self.room))

    def step(self) -> None:
        """Feed the newest token of every row, sample the next one, and drop finished rows when they are many."""
        self.columns += 1
        logits_BV = self.model(
            input_ids=self.next_B[:, None],
            attention_mask=self.mask_BT[:, None, None, : self.columns],
            position_ids=self.position_B[:, None],
            **self.caching,
        ).logits[:, -1]
        self.next_B, logprobs_B = sample(logits_BV, self.uniforms.draw(), self.params.temperature, self.params.top_p)
        self.position_B = self.position_B + 1
        self._record(self.next_B.tolist(), logprobs_B.tolist())
        if 0 < self.alive < _COMPACT_BELOW * len(self.rows):
            self._compact()

    def results(self, weight_version: int) -> list[Generation]:
        """What was sampled, in the order of the requests."""
        self._keep(range(len(self.rows)))
        check_finite(chain.from_iterable(self.logprobs))
        return [
            Generation(tuple(ids), tuple(logprobs), reason, weight_version)
            for ids, logprobs, reason in zip(self.sampled, self.logprobs, self.reasons, strict=True)
        ]

    def _prefilled(self, prompts: Sequence[tuple[int, ...]]) -> Cache:
        """Keys and values of all but the last token of every prompt, in its row's first columns."""
        if not self.packs:
            return self._padded_prefill([prompt[:-1] for prompt in prompts])
        kept = [self.turns.take(request.session, request.token_ids) for request in self.requests]
        known = [len(row.token_ids) if row else 0 for row in kept]
        found, cache = joined(kept), empty_cache()
        index_BT = self._fill(found, [prompt[n:-1] for prompt, n in zip(prompts, known, strict=True)], known)
        for layer, source in enumerate(found.layers):
            rows = (x[0][:, index_BT].transpose(0, 1) for x in (source.keys, source.values))
            cache.update(*rows, layer)
        return cache

    def _fill(self, found: Cache, new: Sequence[tuple[int, ...]], known: Sequence[int]) -> torch.Tensor:
        """Add what each prompt has beyond its ``known`` tokens; returns where in ``found`` each of its tokens is."""
        before, index_BT = sum(known), np.zeros((len(new), self.columns), np.int64)
        if any(new):
            packed = pack(self._padded(new, max(map(len, new))), list(map(len, new)), known)
            packed_states(self.model, packed, **caching(self.model, found))
            new_BT = before + packed.index_BT.cpu().numpy()
        start = 0
        for row, (past, tokens) in enumerate(zip(known, new, strict=True)):
            index_BT[row, :past] = np.arange(start, start + past)
            start += past
            if tokens:
                index_BT[row, past : past + len(tokens)] = new_BT[row, : len(tokens)]
        return torch.from_numpy(index_BT).to(self.device)

    def _padded_prefill(self, prompts: Sequence[tuple[int, ...]]) -> Cache:
        cache = empty_cache()
        if not self.columns:
            return cache
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        input_ids_BL = self._padded(list(distinct), self.columns)
        self.model(input_ids=input_ids_BL, logits_to_keep=1, **caching(self.model, cache))
        if len(distinct) < len(prompts):
            cache.batch_select_indices(self._tensor([distinct[prompt] for prompt in prompts]))
        return cache

    def _mask(self, width: int) -> torch.Tensor:
        """Additive mask over cache columns: a row sees its own prompt and everything sampled, not the padding."""
        column_T = torch.arange(width, device=self.device)
        return self._additive((column_T < self.position_B[:, None]) | (column_T >= self.columns))

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device).masked_fill_(
            ~visible, float("-inf")
        )

    def _padded(self, rows: Sequence[tuple[int, ...]], length: int) -> torch.Tensor:
        return self._tensor([[*row, *[0] * (length - len(row))] for row in rows])

    def _record(self, tokens: list[int], logprobs: list[float]) -> None:
        for row, request in enumerate(self.rows):
            if self.done[row]:
                continue
            self.sampled[request].append(tokens[row])
            self.logprobs[request].append(logprobs[row])
            stopped = tokens[row] in self.stop_ids
            if stopped or len(self.sampled[request]) == self.room[request]:
                self.reasons[request] = "stop" if stopped else "length"
                self.done[row] = True
                self.alive -= 1

    def _keep(self, rows: Iterable[int]) -> None:
        """Leave the keys and values of finished ``rows`` for their episodes' next turn."""
        for row in rows:
            index = self.rows[row]
            request, sampled = self.requests[index], self.sampled[index]
            # A turn that was cut off ends its episode; the last token sampled was never fed.
            if not (self.packs and request.session and self.reasons[index] == "stop" and self.turns.max_bytes):
                continue
            spans = ((0, len(request.token_ids) - 1), (self.prefill_end, self.prefill_end + len(sampled)))
            tokens = (*request.token_ids, *sampled[:-1])
            self.turns.put(request.session, read_row(self.cache, row, spans, tokens))

    def _compact(self) -> None:
        self._keep(row for row, done in enumerate(self.done) if done)
        keep = [row for row, done in enumerate(self.done) if not done]
        keep_B = self._tensor(keep)
        self.cache.batch_select_indices(keep_B)
        self.next_B, self.position_B = self.next_B[keep_B], self.position_B[keep_B]
        self.mask_BT = self.mask_BT[keep_B]
        self.uniforms.keep(keep)
        self.rows = [self.rows[row] for row in keep]
        self.done = [False] * len(keep)

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, grouped attention; the learner finds its model as it left it."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = ATTENTION
    try:
        # Not inference_mode: tensors made under it must never meet autograd, and the parameters are shared.
        with torch.no_grad():
            yield
    finally:
        model.config._attn_implementation = attention
        model.train(training)
