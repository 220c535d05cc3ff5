"""Attention for small models on a CPU, registered with transformers under one name for learner, teacher and engine.

Query heads that share a key-value head are folded into the query dimension, so keys and values are used as they lie
in memory instead of being repeated g times. Beyond that there are four cases:

- rows packed end to end (``packing``): block by block, each row its own tokens and the prefix it shares;
- one new token per row (decoding): the fold alone takes PyTorch's CPU kernel off its slow one-query path;
- short causal sequences on a CPU: plain matrix products, whose backward pass is about 1.5 times faster in bfloat16
  than that of the fused kernel; the scores of all pairs are held, so only up to ``PLAIN_BELOW`` tokens;
- everything else: transformers' own ``sdpa``.

Causal attention over whole rows is all there is. A model that asks for more is refused, since its distribution would be
another one: sinks, capped scores, or a window or chunk that a row is longer than.

Shapes: B rows, H query heads, g of them per key-value head, K key-value heads, Q queries, T keys, D head width; M, b, q
and t as in ``packing``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agentopd.errors import ConfigError
from agentopd.packing import Packed

ATTENTION = "agentopd"
PLAIN_BELOW = 512
_UNLIKE = {"s_aux": "sinks", "softcap": "capped scores", "position_bias": "a bias by position"}


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """``query`` (B, H, Q, D), ``key`` and ``value`` (B, H/g, T, D) to (B, Q, H, D); causal where no mask is given.

    With ``packed`` the one row holds packed tokens, and each attends to its own row alone.
    """
    _refuse_unlike(module, key, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    packed: Packed | None = kwargs.pop("packed", None)
    if packed is not None:
        query_MHD, key_MKD, value_MKD = (x[0].transpose(0, 1) for x in (query, key, value))
        return packed_attention(query_MHD, key_MKD, value_MKD, packed, scale)[None], None
    B, H, Q, D = query.shape
    kv_heads, T = key.shape[1], key.shape[2]
    if Q == 1 and kv_heads < H:
        folded = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(B, kv_heads, H // kv_heads, D),
            key,
            value,
            attn_mask=attention_mask,
            scale=scale,
        )
        return folded.reshape(B, 1, H, value.shape[-1]), None
    if attention_mask is None and Q == T <= PLAIN_BELOW and query.device.type == "cpu" and not kwargs.get("dropout"):
        future = torch.full((T, T), float("-inf"), dtype=query.dtype).triu(1)
        return _plain(query * scale, key, value, future).transpose(1, 2), None
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def longest_row(config: Any) -> float:
    """Tokens of a row up to which windows and chunks change nothing: a model's whole rows are then all it sees."""
    widths = (getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))
    return min((width for width in widths if width), default=math.inf)


def _refuse_unlike(module: torch.nn.Module, key: Tensor, mask: Tensor | None, asked: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for what the model asks of attention and does not get here."""
    for name, what in _UNLIKE.items():
        if asked.get(name) is not None:
            raise ConfigError(f"the model's attention has {what} ({name}): not supported, choose another model")
    most = min(asked.get("sliding_window") or math.inf, longest_row(getattr(module, "config", None)))
    packed: Packed | None = asked.get("packed")
    tokens = key.shape[2] if packed is None else packed.longest
    if tokens > most and mask is not None:  # columns of a cache, some of them padding
        tokens = int((mask if mask.dtype == torch.bool else mask == 0).sum(-1).max())
    if tokens > most:
        raise ConfigError(
            f"a row of {tokens} tokens is longer than the model's attention window of {most:g}: not supported, "
            "shorten the episodes, or choose another model"
        )


def packed_attention(query_MHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, packed: Packed, scale: float) -> Tensor:
    """Causal attention of every packed token to its own row (M, H, D)."""
    H, K = query_MHD.shape[1], key_MKD.shape[1]
    query, key, value = (x.reshape(-1, x.shape[-1]) for x in (query_MHD * scale, key_MKD, value_MKD))
    mixed = []
    for query_bq, key_bt, future_b1qt in packed.blocks:
        (b, q), t = query_bq.shape, key_bt.shape[1]
        of_query, of_key = _by_head(query_bq, H), _by_head(key_bt, K)
        queries_bHqD = query.index_select(0, of_query).view(b, H, q, -1)
        keys_bKtD, values_bKtD = (x.index_select(0, of_key).view(b, K, t, -1) for x in (key, value))
        attend = _plain if query.device.type == "cpu" and t <= PLAIN_BELOW else _fused
        found_bHqD = attend(queries_bHqD, keys_bKtD, values_bKtD, future_b1qt.to(query.dtype))
        mixed.append(found_bHqD.transpose(1, 2).reshape(b * q, H, -1))
    return torch.cat(mixed).index_select(0, packed.place_M)


def _by_head(index_bn: Tensor, heads: int) -> Tensor:
    """Rows of an (M * heads, D) table that hold the given tokens, heads before tokens (b * heads * n,)."""
    return (index_bn[:, None] * heads + torch.arange(heads, device=index_bn.device)[:, None]).flatten()


def _plain(query: Tensor, key: Tensor, value: Tensor, future: Tensor) -> Tensor:
    """(B, H, Q, D), all scores held; ``query`` is scaled already, ``future`` (B or 1, 1, Q, T) is added to them."""
    B, H, Q, D = query.shape
    K, T = key.shape[1:3]
    scores = torch.bmm(query.reshape(B * K, -1, D), key.reshape(B * K, T, D).transpose(1, 2))
    scores.view(B, H, Q, T).add_(future)
    return torch.bmm(scores.softmax(-1), value.reshape(B * K, T, -1)).view(B, H, Q, -1)


def _fused(query: Tensor, key: Tensor, value: Tensor, future: Tensor) -> Tensor:
    """The same by PyTorch's kernel."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=future, scale=1.0, enable_gqa=True
    )


AttentionInterface.register(ATTENTION, grouped_attention)
