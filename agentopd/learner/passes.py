"""Softmax arithmetic over the vocabulary, one pass over a chunk of logits at a time, in fp32 or finer.

What a pass computes is a plain function of elements. A large chunk gets it compiled into one loop (``torch.compile``:
C++ on a CPU, Triton on a GPU). A small chunk, or one on a machine that cannot compile, goes through it in blocks of the
vocabulary that stay in a CPU's cache. ``TORCH_COMPILE_DISABLE=1`` keeps to blocks.

c positions of a chunk, V ids, B ids of a block, I ids at which something is added.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agentopd.learner.products import vocabulary_blocks

COMPILED_IDS = 2**15
"""Vocabularies from this size on are worth a compiler's seconds ..."""
COMPILED_LOGITS = 2**24
"""... in chunks of so many logits."""

Elements = Callable[..., Any]
"""Of tensors (c, B) as wide as a block, then of columns (c, 1). May overwrite the former."""


class Part(NamedTuple):
    """A function of elements with what it reads: tensors (c, V), the first of them logits, and columns (c, 1)."""

    elements: Elements
    wide: Sequence[Tensor]
    columns: Sequence[Tensor]

    def of(self, wide: Sequence[Tensor]) -> Any:
        """The function on these elements instead."""
        return self.elements(*(x.to(fine(x)) for x in wide), *self.columns)

    def block(self, block: slice) -> Any:
        """The function on a block of ids."""
        return self.of([x[:, block] for x in self.wide])


def fine(x: Tensor) -> torch.dtype:
    """The dtype of sums and softmax arithmetic: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def log_total(logits_cV: Tensor) -> Tensor:
    """The softmax's log-denominator (c, 1)."""
    if compiles(logits_cV):
        found = _compiled(_log_total, None, (logits_cV,), ())
        if found is not None:
            return found  # type: ignore[no-any-return]
    parts = [_log_total(None, [logits_cV[:, block]], ()) for block in vocabulary_blocks(logits_cV)]
    return torch.cat(parts, -1).logsumexp(-1, keepdim=True)


def summed(part: Part) -> Sequence[Tensor]:
    """The sum over ids (c,) of each of the tensors that the part's function gives."""
    if compiles(part.wide[0]):
        found = _compiled(_sums, *part)
        if found is not None:
            return found  # type: ignore[no-any-return]
    totals: list[Tensor] = []
    for block in vocabulary_blocks(part.wide[0]):
        sums = [x.sum(-1) for x in part.block(block)]
        totals = [total + more for total, more in zip(totals, sums, strict=True)] if totals else sums
    return totals


def overwrite(logits_cV: Tensor, parts: Sequence[Part], ids_cI: Tensor, added_cI: Tensor) -> None:
    """Overwrite logits by what the parts give, side by side over the vocabulary, plus what is added at some ids.

    The sum is taken before it is rounded to the logits' dtype: where p is near 1 the two nearly cancel. An id may
    stand in a row more than once.
    """
    if compiles(logits_cV):
        found_cI = _at(parts, ids_cI) + _over_repeats(ids_cI, added_cI)
        for part in parts:
            if _compiled(_write, *part) is None:
                _write_blocks(part)
        rows_c1 = torch.arange(len(ids_cI), device=ids_cI.device)[:, None]
        logits_cV[rows_c1, ids_cI] = found_cI.to(logits_cV.dtype)  # ``scatter_`` would copy all logits
        return
    for part in parts:
        _write_blocks(part, ids_cI, added_cI)
        ids_cI = ids_cI - part.wide[0].shape[1]


def compiles(logits_cV: Tensor) -> bool:
    """Whether a pass over such a chunk is compiled."""
    large = logits_cV.shape[1] >= COMPILED_IDS and logits_cV.numel() >= COMPILED_LOGITS
    return large and can_compile(logits_cV.device.type)


def can_compile(device: str) -> bool:
    """Whether such a device has what compiling for it takes, and it has not failed in this process."""
    return device not in _CANNOT and _has_compiler(device)


def _log_total(_: None, wide: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    return wide[0].to(fine(wide[0])).logsumexp(-1, keepdim=True)


def _sums(elements: Elements, wide: Sequence[Tensor], columns: Sequence[Tensor]) -> Sequence[Tensor]:
    return [x.sum(-1) for x in Part(elements, wide, columns).of(wide)]


def _write(elements: Elements, wide: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    return wide[0].copy_(Part(elements, wide, columns).of(wide))


def _write_blocks(part: Part, ids_cI: Tensor | None = None, added_cI: Tensor | None = None) -> None:
    """Overwrite a part's logits; what is added at ids that are not among its own is left out."""
    for block in vocabulary_blocks(part.wide[0]):
        found_cB = part.block(block)
        if ids_cI is not None and added_cI is not None:
            inside_cI = (ids_cI >= block.start) & (ids_cI < block.stop)
            local_cI = torch.where(inside_cI, ids_cI - block.start, 0)
            found_cB.scatter_add_(1, local_cI, torch.where(inside_cI, added_cI, 0.0))
        part.wide[0][:, block] = found_cB


def _at(parts: Sequence[Part], ids_cI: Tensor) -> Tensor:
    """What the parts give at some ids (c, I)."""
    offset = 0
    found_cI: Tensor | None = None
    for part in parts:
        width = part.wide[0].shape[1]
        local_cI = (ids_cI - offset).clamp(0, width - 1)
        here_cI: Tensor = part.of([x.gather(1, local_cI) for x in part.wide])
        found_cI = here_cI if found_cI is None else torch.where(ids_cI >= offset, here_cI, found_cI)
        offset += width
    assert found_cI is not None
    return found_cI


def _over_repeats(ids_cI: Tensor, added_cI: Tensor) -> Tensor:
    """At each id what is added to it anywhere in its row (c, I)."""
    sorted_cI, order_cI = ids_cI.sort(-1)
    group_cI = torch.nn.functional.pad(sorted_cI.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
    totals_cI = torch.zeros_like(added_cI).scatter_add_(1, group_cI, added_cI.gather(1, order_cI))
    return torch.empty_like(added_cI).scatter_(1, order_cI, totals_cI.gather(1, group_cI))


def _compiled(
    run: Callable[..., Any], elements: Elements | None, wide: Sequence[Tensor], columns: Sequence[Tensor]
) -> Any:
    """``run`` as one compiled loop, or None where that fails."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    limit = sys.getrecursionlimit()
    try:
        return _loop(run, elements)(tuple(wide), tuple(columns))
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        _CANNOT.add(wide[0].device.type)
        cause = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        warnings.warn(f"passes over the vocabulary are not compiled, which is slower: {cause}", stacklevel=2)
        return None
    finally:
        # PyTorch's compiler raises it; how deep a candidate's program may nest is the verifiers' to say.
        sys.setrecursionlimit(limit)


@cache
def _loop(run: Callable[..., Any], elements: Elements | None) -> Callable[..., Any]:
    def loop(wide: Sequence[Tensor], columns: Sequence[Tensor]) -> Any:
        return run(elements, wide, columns)

    # PyTorch counts what it compiled by code object, and gives up on one that it compiled often.
    loop.__code__ = loop.__code__.replace(co_name=f"loop_{next(_NUMBER)}")
    return torch.compile(loop, dynamic=True, fullgraph=True)


_NUMBER = count()
_CANNOT: set[str] = set()
"""Kinds of device for which compiling has failed in this process."""


@cache
def _has_compiler(device: str) -> bool:
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    if device == "cuda":
        return find_spec("triton") is not None
    return device == "cpu" and any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
