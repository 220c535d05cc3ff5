"""The three matrix products of an output head, in fp32 where the processor would only emulate bfloat16.

A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than fp32 ones. There the factors
are cast a block of the vocabulary at a time, so that no whole copy of the head is made; results are rounded to the
dtype they would have had.

c positions of a chunk, H hidden width, V vocabulary, B ids of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from agentopd.models import settle_dtype

BLOCK = 4096
"""Ids in one block of fp32 arithmetic."""


def vocabulary_blocks(logits_cV: Tensor) -> Iterator[slice]:
    """The ids of the last dimension, in blocks."""
    width = logits_cV.shape[-1]
    for start in range(0, width, BLOCK):
        yield slice(start, min(start + BLOCK, width))


def emulated(x: Tensor) -> bool:
    """Whether products of such matrices are emulated."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and _emulates_bfloat16()


def logits(hidden_cH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits (c, V) in the head's dtype."""
    found_cV = hidden_cH.new_empty(len(hidden_cH), len(weight_VH))
    if not emulated(weight_VH):  # on a CPU a tenth faster than ``linear``, which makes its output itself
        if bias_V is None:
            return torch.mm(hidden_cH, weight_VH.t(), out=found_cV)
        return torch.addmm(bias_V, hidden_cH, weight_VH.t(), out=found_cV)
    fine_cH = hidden_cH.float()
    for block in vocabulary_blocks(found_cV):
        bias_B = None if bias_V is None else bias_V[block].float()
        found_cV[:, block] = torch.nn.functional.linear(fine_cH, weight_VH[block].float(), bias_B)
    return found_cV


def into_hidden(slope_cV: Tensor, weight_VH: Tensor, out_cH: Tensor) -> None:
    """Write the gradient of the hidden states (c, H), given the one of the logits."""
    if not emulated(weight_VH):
        torch.mm(slope_cV, weight_VH, out=out_cH)
        return
    total_cH = torch.zeros_like(out_cH, dtype=torch.float32)
    for block in vocabulary_blocks(slope_cV):
        total_cH.addmm_(slope_cV[:, block].float(), weight_VH[block].float())
    out_cH.copy_(total_cH)


def add_to_weight(total_VH: Tensor, slope_cV: Tensor, hidden_cH: Tensor, first: bool = False) -> None:
    """Add the gradient of the head's weight to ``total_VH``, in fp32 or finer; the ``first`` one overwrites."""
    in_fine = emulated(slope_cV)
    factor_cH = hidden_cH.float() if in_fine else hidden_cH
    for block in vocabulary_blocks(slope_cV):
        slope_Bc = (slope_cV[:, block].float() if in_fine else slope_cV[:, block]).t()
        if total_VH.dtype == factor_cH.dtype:
            total_VH[block].addmm_(slope_Bc, factor_cH, beta=0 if first else 1)
        elif first:
            total_VH[block] = slope_Bc @ factor_cH
        else:
            total_VH[block] += slope_Bc @ factor_cH


def scaled(x_VH: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x_VH`` times a scalar in another dtype, without a product of its size in its own."""
    found_VH = torch.empty_like(x_VH, dtype=dtype)
    for start in range(0, len(x_VH), BLOCK):
        found_VH[start : start + BLOCK] = x_VH[start : start + BLOCK] * scale
    return found_VH


@cache
def _emulates_bfloat16() -> bool:
    return settle_dtype("auto") == "float32"
