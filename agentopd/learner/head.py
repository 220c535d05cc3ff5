"""Log-probs of a causal language model at chosen positions, without ever holding all logits.

Positions that do not train are dropped between the transformer's body and its output head. The head then runs over
chunks of positions, each recomputed in the backward pass, so that one (chunk, V) block is alive at a time; log-softmax
is in fp32. B episodes, T padded length, N chosen positions, H hidden width, K ids per position, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentopd.errors import ConfigError

CHUNK_LOGITS = 2**24
"""Logits in one chunk: 64 MiB in fp32."""
MIN_CHUNK = 256
"""Positions a chunk has at least: smaller ones re-read the head's weight too often."""
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Head(NamedTuple):
    """Output projection: weight (V, H) and bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    student_ids: Tensor | None = None
    """A teacher's with another tokenizer: for each id the student's that stands for the same, or -1 (V,)."""


def output_head(model: Any, vocab_size: int | None = None) -> Head:
    """The model's output projection, cut to the first ``vocab_size`` ids where given.

    Raises ``ConfigError`` for models that transform logits after the projection, since their log-probs would be wrong.
    """
    for key in _LOGIT_TRANSFORMS:
        if getattr(model.config, key, None) not in (None, 1.0):
            raise ConfigError(f"{type(model).__name__} applies {key}={getattr(model.config, key)!r}: not supported")
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(layer.weight[:vocab_size], None if bias is None else bias[:vocab_size])


def head_logprobs(
    hidden_NH: Tensor, head: Head, target_N: Tensor, ids_NK: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Full-vocabulary log-probs in fp32 at the target (N,) and at ``ids_NK`` (N, K), differentiable."""
    ids = torch.cat([target_N[:, None], ids_NK], dim=1)
    chunk = chunk or chunk_size(head)
    if len(ids) <= chunk:
        found = _gathered_logprobs(hidden_NH, head.weight, head.bias, ids)
    else:
        found = torch.cat(
            [
                checkpoint(_gathered_logprobs, hidden, head.weight, head.bias, some, use_reentrant=False)
                for hidden, some in zip(torch.split(hidden_NH, chunk), torch.split(ids, chunk), strict=True)
            ]
        )
    return found[:, 0], found[:, 1:]


@torch.no_grad()
def head_topk(
    hidden_NH: Tensor, head: Head, target_N: Tensor, k: int, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target (N,), and the k most likely ids with their log-probs (N, k), in fp32, no gradient."""
    logprobs, ids, topk = [], [], []
    chunk = chunk or chunk_size(head)
    for hidden, target in zip(torch.split(hidden_NH, chunk), torch.split(target_N, chunk), strict=True):
        logits = _logits(hidden, head.weight, head.bias)
        log_total = logits.logsumexp(-1, keepdim=True)
        values, indices = logits.topk(k, dim=-1)
        logprobs.append((logits.gather(1, target[:, None]) - log_total)[:, 0])
        ids.append(indices)
        topk.append(values - log_total)
    return torch.cat(logprobs), torch.cat(ids), torch.cat(topk)


def chunk_size(head: Head) -> int:
    """Positions in one chunk, by default."""
    return max(MIN_CHUNK, CHUNK_LOGITS // head.weight.shape[0])


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits (N, V) in fp32."""
    return _logits(hidden, head.weight, head.bias)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


def _gathered_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    logits = _logits(hidden, weight, bias)
    return logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
