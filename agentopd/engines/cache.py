"""Keys and values of the in-process engine: buffers written in place, and rows kept from one turn to the next.

Shapes: B rows, H key-value heads, P cached tokens of one row, D head width.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_SPARE = 64
"""Columns allocated beyond those asked for: growing copies the buffer, so it is done once in so many tokens."""


class BufferedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values in a buffer with room to spare.

    transformers' own layer concatenates, which copies everything cached for every token sampled.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, n, D) columns; returns all columns so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys = _written(self.keys, key_states, start)
        self.values = _written(self.values, value_states, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length


def _written(buffer: Tensor, new: Tensor, start: int) -> Tensor:
    end = start + new.shape[-2]
    if buffer.dim() < 4 or end > buffer.shape[-2]:
        grown = new.new_empty(*new.shape[:2], end + _SPARE, new.shape[-1])
        if start:
            grown[:, :, :start] = buffer[:, :, :start]
        buffer = grown
    buffer[:, :, start:end] = new
    return buffer


def empty_cache() -> Cache:
    """A cache of ``BufferedLayer`` for any model with plain attention layers."""
    return Cache(layer_class_to_replicate=BufferedLayer)


def caching(model: Any, cache: Cache) -> dict[str, Any]:
    """Arguments that make ``model`` read and extend ``cache``, which older transformers call ``past_key_values``."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


@dataclass(frozen=True)
class Row:
    """What one sequence left behind: the tokens whose keys and values are known, and those, (2 x layers, H, P, D)."""

    token_ids: tuple[int, ...]
    kv: Tensor


def read_row(cache: Cache, row: int, spans: Sequence[tuple[int, int]], token_ids: tuple[int, ...]) -> Row:
    """Copy the columns ``spans`` of one row out of a batch's cache."""
    pieces = [
        torch.cat([buffer[row, :, start:end] for start, end in spans], dim=1)
        for layer in cache.layers
        for buffer in (layer.keys, layer.values)
    ]
    return Row(token_ids, torch.stack(pieces))


def joined(rows: Sequence[Row | None]) -> Cache:
    """A cache of one row that holds those of ``rows`` that there are, end to end."""
    cache = empty_cache()
    found = [row.kv for row in rows if row]
    if found:
        keys_and_values = torch.cat(found, dim=2)[:, None]
        for layer in range(len(keys_and_values) // 2):
            cache.update(keys_and_values[2 * layer], keys_and_values[2 * layer + 1], layer)
    return cache


class TurnCache:
    """Rows kept between the turns of an episode, by session; the oldest leave when ``max_bytes`` are exceeded.

    Keys and values belong to the weights they were computed with: ``clear`` it whenever those change.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._bytes = 0

    def put(self, session: str, row: Row) -> None:
        """Keep a row for the session's next turn, where there is room."""
        self.take(session, ())
        self._rows[session] = row
        self._bytes += row.kv.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._rows.popitem(last=False)[1].kv.nbytes

    def take(self, session: str, token_ids: Sequence[int]) -> Row | None:
        """Remove the session's row and return it, if ``token_ids`` continue it by at least one token."""
        row = self._rows.pop(session, None)
        if row is None:
            return None
        self._bytes -= row.kv.nbytes
        known = len(row.token_ids)
        return row if known < len(token_ids) and tuple(token_ids[:known]) == row.token_ids else None

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._bytes = 0
