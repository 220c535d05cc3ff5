"""Rows of tokens laid end to end for one forward pass: no padding, and every shared prefix once.

Under causal attention a hidden state depends on the tokens up to it alone. Rows that begin alike (copies of a prompt,
prompts under one system message) therefore share the states of their beginning, in value and in gradient. Among sorted
rows the longest common prefix is the one with the row before, so each row owns the tokens after that one.

Attention (``attention.packed_attention``) runs in blocks: some of a row's own queries against every token of the row up
to the last of them. Shapes: B rows, T tokens of the longest, M packed tokens; in a block b pieces of rows, q queries
and t keys of each, padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agentopd.objective.microbatches import bucket_by_length

QUERIES = 128
"""Most queries of one row in a block: a causal row of n tokens then costs little more than n^2 / 2 scores."""
KEYS = 4096
"""Most keys of all rows in a block."""

Rows = npt.NDArray[np.int64]


class Block(NamedTuple):
    """Indices of queries among the packed tokens and of keys among the cached and the packed ones, 0 where padded, and
    what is added to their scores: 0 or -inf.
    """

    query_bq: Tensor
    key_bt: Tensor
    future_b1qt: Tensor


class Packed(NamedTuple):
    """The packed tokens and how they attend."""

    token_ids_M: Tensor
    positions_M: Tensor
    index_BT: Tensor
    """Where each token of each row went."""
    blocks: tuple[Block, ...]
    place_M: Tensor
    """Which of the blocks' queries, one after another, each packed token is."""
    longest: int
    """Tokens of the longest row, cached ones too."""


def pack(input_ids_BT: Tensor, lengths: Sequence[int], cached: Sequence[int] = ()) -> Packed:
    """Pack the first ``lengths[b]`` tokens of each row ``b``; tensors come back on the device of the ids.

    ``cached[b]`` tokens stand before them in a cache that holds every row's, in order and end to end.
    """
    ids_BT: Rows = input_ids_BT.cpu().numpy()
    index_BT = np.zeros_like(ids_BT)
    known_B = np.array(cached or [0] * len(lengths), np.int64)
    end_B = known_B.cumsum()
    order = sorted(range(len(lengths)), key=lambda b: (known_B[b] > 0, ids_BT[b, : lengths[b]].astype(">i8").tobytes()))
    pieces: list[tuple[Rows, Rows]] = []
    total, before, before_index = 0, ids_BT[0, :0], index_BT[0, :0]
    for row in order:
        tokens, index = ids_BT[row, : lengths[row]], index_BT[row, : lengths[row]]
        shared = 0 if known_B[row] else _common_prefix(before, tokens)
        index[:shared] = before_index[:shared]
        index[shared:] = np.arange(total, total + len(index) - shared)
        total, before, before_index = total + len(index) - shared, tokens, index
        past = np.arange(end_B[row] - known_B[row], end_B[row])
        for start in range(shared, lengths[row], QUERIES):
            stop = min(start + QUERIES, lengths[row])
            pieces.append((np.concatenate([past, end_B[-1] + index[:stop]]), index[start:stop]))
    token_ids_M, positions_M = np.zeros((2, total), np.int64)
    for row, length in enumerate(lengths):
        token_ids_M[index_BT[row, :length]] = ids_BT[row, :length]
        positions_M[index_BT[row, :length]] = np.arange(known_B[row], known_B[row] + length)
    blocks, place_M = _blocks(pieces, total)
    device = input_ids_BT.device
    return Packed(
        token_ids_M=torch.from_numpy(token_ids_M).to(device),
        positions_M=torch.from_numpy(positions_M).to(device),
        index_BT=torch.from_numpy(index_BT).to(device),
        blocks=tuple(Block(*(x.to(device) for x in block)) for block in blocks),
        place_M=torch.from_numpy(place_M).to(device),
        longest=int((known_B + np.array(lengths)).max()),
    )


def _common_prefix(one: Rows, other: Rows) -> int:
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _blocks(pieces: Sequence[tuple[Rows, Rows]], total: int) -> tuple[list[Block], Rows]:
    """Group pieces (keys, and the queries, which are the last of them) of similar length; the ``place_M`` of each."""
    blocks, place_M, filled = [], np.zeros(total, np.int64), 0
    for members in bucket_by_length([len(keys) for keys, _ in pieces], KEYS):
        chosen = [pieces[i] for i in members]
        b, q, t = len(chosen), max(len(queries) for _, queries in chosen), max(len(keys) for keys, _ in chosen)
        (query_bq, position_bq), key_bt = np.zeros((2, b, q), np.int64), np.zeros((b, t), np.int64)
        for i, (keys, queries) in enumerate(chosen):
            own = len(queries)
            key_bt[i, : len(keys)] = keys
            query_bq[i, :own] = queries
            position_bq[i, :own] = np.arange(len(keys) - own, len(keys))
            place_M[queries] = filled + i * q + np.arange(own)
        filled += b * q
        future = torch.from_numpy(np.arange(t) > position_bq[:, None, :, None])
        future_b1qt = torch.zeros(b, 1, q, t).masked_fill_(future, float("-inf"))
        blocks.append(Block(torch.from_numpy(query_bq), torch.from_numpy(key_bt), future_b1qt))
    return blocks, place_M
