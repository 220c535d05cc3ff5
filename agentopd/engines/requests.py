"""What every engine asks of a request, and of what it sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from agentopd.attention import longest_row
from agentopd.contracts import GenerationRequest
from agentopd.errors import EngineError


def context_limit(config: Any, asked: int | None) -> int:
    """Tokens that a model's context holds, at most ``asked``: as many as the learner can train on."""
    return int(min(asked or math.inf, config.max_position_embeddings, longest_row(config)))


def check_fits(request: GenerationRequest, max_context: int) -> None:
    """Raise ``EngineError`` for a request that is empty or longer than the context."""
    length, room = len(request.token_ids), request.params.max_tokens
    if length == 0 or room < 1 or length + room > max_context:
        raise EngineError(
            f"a request of {length} tokens plus max_tokens={room} does not fit a context of {max_context}"
        )


def check_finite(logprobs: Iterable[float]) -> None:
    """Raise ``EngineError`` for log-probs of broken weights."""
    if not all(map(math.isfinite, logprobs)):
        raise EngineError("a sampled token has a non-finite log-prob: the weights are broken (NaN or infinite)")
