"""A causal language model's output projection, and log-probs from it without ever holding all logits.

Positions that do not train are dropped before it. The others go through in chunks, so that one (chunk, V) block of
logits is alive at a time; log-softmax is in fp32. Nothing here has a gradient: training goes through ``fused_head``.
N positions, c positions of a chunk, H hidden width, K ids per position, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentopd.errors import ConfigError
from agentopd.learner import passes, products

CHUNK_LOGITS = 2**24
"""Logits in one chunk: 64 MiB in fp32."""
MIN_CHUNK = 1024
"""Positions a chunk has at least: smaller ones read the head's weight, and sum its gradient, too often."""
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Head(NamedTuple):
    """Output projection: weight (V, H) and bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    student_ids: Tensor | None = None
    """A teacher's with another tokenizer: for each id the student's that stands for the same, or -1 (V,)."""

    def logits(self, hidden_cH: Tensor) -> Tensor:
        """Logits (c, V) in the head's dtype."""
        return products.logits(hidden_cH, self.weight, self.bias)


class LogSoftmax:
    """Log-probs of ``logits`` (c, V) in fp32 or finer, without holding them: by id, or as part of a pass."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.log_total_c1 = passes.log_total(logits)

    def at(self, ids_cI: Tensor) -> Tensor:
        """Log-probs at some ids (c, I)."""
        return self.logits.gather(1, ids_cI).to(self.log_total_c1.dtype) - self.log_total_c1

    def at_any(self, ids_cI: Tensor) -> Tensor:
        """The same at ids of a larger vocabulary (c, I): -inf for those beyond this one."""
        num_ids = self.logits.shape[1]
        return self.at(ids_cI.clamp(max=num_ids - 1)).masked_fill(ids_cI >= num_ids, -torch.inf)

    def everywhere(self) -> Tensor:
        """All of them (c, V), in memory of their own."""
        return self.logits.to(self.log_total_c1.dtype) - self.log_total_c1

    def entropy(self) -> Tensor:
        """In nats (c,)."""
        (total_c,) = passes.summed(passes.Part(_entropy, (self.logits,), (self.log_total_c1,)))
        return total_c


def _entropy(logits: Tensor, log_total_c1: Tensor) -> tuple[Tensor]:
    logprobs = logits - log_total_c1
    return (-logprobs.exp() * logprobs,)


def output_head(model: Any, vocab_size: int | None = None) -> Head:
    """The model's output projection, cut to the first ``vocab_size`` ids where given.

    Raises ``ConfigError`` for models that transform logits after the projection, since their log-probs would be wrong.
    """
    for key in _LOGIT_TRANSFORMS:
        if getattr(model.config, key, None) not in (None, 1.0):
            raise ConfigError(f"{type(model).__name__} applies {key}={getattr(model.config, key)!r}: not supported")
    layer = model.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if vocab_size is None:  # not a slice of everything: its gradient would be copied into zeros
        return Head(weight, bias)
    return Head(weight[:vocab_size], None if bias is None else bias[:vocab_size])


@torch.no_grad()
def head_logprobs(
    hidden_NH: Tensor, head: Head, target_N: Tensor, ids_NK: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Full-vocabulary log-probs in fp32 at the target (N,) and at ``ids_NK`` (N, K); -inf for ids beyond the head's."""
    ids, chunk = torch.cat([target_N[:, None], ids_NK], dim=1), chunk or chunk_size(head)
    pairs = zip(torch.split(hidden_NH, chunk), torch.split(ids, chunk), strict=True)
    found = torch.cat([LogSoftmax(head.logits(hidden)).at_any(some) for hidden, some in pairs])
    return found[:, 0], found[:, 1:]


@torch.no_grad()
def head_topk(
    hidden_NH: Tensor, head: Head, target_N: Tensor, k: int, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of the target (N,), -inf beyond the head's ids, and the k most likely ids with theirs (N, k); fp32."""
    logprobs, ids, topk = [], [], []
    chunk = chunk or chunk_size(head)
    for hidden, target in zip(torch.split(hidden_NH, chunk), torch.split(target_N, chunk), strict=True):
        found = LogSoftmax(head.logits(hidden))
        indices = found.logits.topk(k, dim=-1).indices
        logprobs.append(found.at_any(target[:, None])[:, 0])
        ids.append(indices)
        topk.append(found.at(indices))
    return torch.cat(logprobs), torch.cat(ids), torch.cat(topk)


def chunk_size(head: Head) -> int:
    """Positions in one chunk, by default."""
    return chunk_size_of(head.weight.shape[0])


def chunk_size_of(vocabulary: int) -> int:
    """The same for a head of so many ids."""
    return max(MIN_CHUNK, CHUNK_LOGITS // vocabulary)
