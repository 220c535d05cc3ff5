"""A canary for weight syncs: an engine and the learner must agree on the log-probs of what the engine samples.

A sync can go wrong without an error: a tied output head that stays behind, keys and values cached under the old
weights, a shard that was never sent. All of them show here. Shapes: P prompts, T prompt length, N sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from agentopd.contracts import Generation, GenerationRequest, SamplingParams
from agentopd.errors import EngineError

_PROMPTS, _SAMPLED = 4, 6
_TEMPERATURE = 0.8
"""Not 1, so that an engine shows that its log-probs are those of the distribution it samples from."""
_LENGTH = 64
"""Long enough to fill blocks of a prefix cache: the same prompts at every sync would meet what it kept."""
_BOUNDS = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""Rounding alone gives means of 0.002 to 0.02 in bfloat16 and below 1e-5 in float32."""


class Canary:
    """Fixed prompts for one ``model``; ``bound`` is on the mean absolute difference, None picks it by dtype."""

    def __init__(self, model: Any, max_context: int, bound: float | None = None) -> None:
        self._model = model
        self.bound = bound or _BOUNDS[model.dtype]
        length = min(_LENGTH, max_context - _SAMPLED)
        draw = torch.Generator().manual_seed(0)
        prompts_PT = torch.randint(model.config.vocab_size, (_PROMPTS, length), generator=draw)
        params = SamplingParams(_TEMPERATURE, max_tokens=_SAMPLED)
        self.requests = [GenerationRequest(row, params, seed) for seed, row in enumerate(prompts_PT.tolist())]
        self._known: tuple[list[tuple[int, ...]], torch.Tensor] | None = None
        """What was sampled at the last check, and the learner's log-probs of it (P, N)."""

    def check(self, sampled: list[Generation]) -> float:
        """Mean |engine - learner| log-prob over what the engine sampled for ``requests``, in nats.

        Raises ``EngineError`` above the bound: the engine does not sample from the learner's weights.
        """
        return self.check_several([sampled])

    @torch.no_grad()
    def check_several(self, sampled: Sequence[list[Generation]]) -> float:
        """``check`` of several engines in one forward pass, which is one for every rank; the largest of their means."""
        every = [made for one in sampled for made in one]
        asked = self.requests * len(sampled)
        rows = [[*request.token_ids, *made.token_ids] for request, made in zip(asked, every, strict=True)]
        ids_PT = torch.tensor(rows, device=next(self._model.parameters()).device)
        logits = self._model(input_ids=ids_PT, logits_to_keep=_SAMPLED + 1).logits[:, :-1].float() / _TEMPERATURE
        learner_PN = logits.log_softmax(-1).gather(-1, ids_PT[:, -_SAMPLED:, None])[..., 0].cpu()
        engine_PN = torch.tensor([made.logprobs for made in every])
        gaps = (engine_PN - learner_PN).abs().view(len(sampled), -1).mean(1)
        gap = self._bounded(float(gaps.max()))
        self._known = [made.token_ids for made in sampled[0]], learner_PN[: len(sampled[0])]
        return gap

    def forget(self) -> None:
        """The weights have changed: what is known of the last check is of others."""
        self._known = None

    def check_again(self, sampled: list[Generation]) -> None:
        """Hold an engine that came back to the last ``check``, whose weights the learner may no longer have.

        Equal weights and seeds give equal samples, but for rounding: log-probs are compared as far as ids agree.
        Raises ``EngineError`` as ``check`` does; nothing is checked after ``forget``.
        """
        if self._known is None:
            return
        gaps: list[float] = []
        for made, ids, learner_N in zip(sampled, *self._known, strict=True):
            pairs = zip(made.token_ids, ids, made.logprobs, learner_N.tolist(), strict=True)
            same = takewhile(lambda pair: pair[0] == pair[1], pairs)
            gaps += [abs(engine - learner) for _, _, engine, learner in same]
        if len(gaps) < _PROMPTS * _SAMPLED // 2:
            raise EngineError(f"an engine that came back repeats {len(gaps)} of {_PROMPTS * _SAMPLED} tokens")
        self._bounded(sum(gaps) / len(gaps))

    def _bounded(self, gap: float) -> float:
        if not gap <= self.bound:
            raise EngineError(
                f"the engine's log-probs differ from the learner's by {gap:.2g} on average (bound {self.bound:g}): "
                "it samples from other weights; if rounding alone is that large, raise canary_bound"
            )
        return gap
