"""A canary for weight syncs: an engine and the learner must agree on the log-probs of what the engine samples.

A sync can go wrong without an error: a tied output head that stays behind, keys and values cached under the old
weights, a shard that was never sent. All of them show here. Shapes: P prompts, T prompt length, N sampled tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from agentopd.contracts import Generation, GenerationRequest, SamplingParams
from agentopd.errors import EngineError

_PROMPTS, _SAMPLED = 4, 16
_LENGTH = 96
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
        params = SamplingParams(max_tokens=_SAMPLED)
        self.requests = [GenerationRequest(row, params, seed) for seed, row in enumerate(prompts_PT.tolist())]

    @torch.no_grad()
    def check(self, sampled: list[Generation]) -> float:
        """Mean |engine - learner| log-prob over what the engine sampled for ``requests``, in nats.

        Raises ``EngineError`` above the bound: the engine does not sample from the learner's weights.
        """
        rows = [[*request.token_ids, *made.token_ids] for request, made in zip(self.requests, sampled, strict=True)]
        ids_PT = torch.tensor(rows, device=next(self._model.parameters()).device)
        logits = self._model(input_ids=ids_PT, logits_to_keep=_SAMPLED + 1).logits[:, :-1].float()
        learner_PN = logits.log_softmax(-1).gather(-1, ids_PT[:, -_SAMPLED:, None])[..., 0]
        engine_PN = torch.tensor([made.logprobs for made in sampled], device=learner_PN.device)
        gap = float((engine_PN - learner_PN).abs().mean())
        if not gap <= self.bound:
            raise EngineError(
                f"the engine's log-probs differ from the learner's by {gap:.2g} on average (bound {self.bound:g}): "
                "it samples from other weights; if rounding alone is that large, raise canary_bound"
            )
        return gap
