"""Two tokenizers over one text: where their tokens meet, and what their distributions share (SimCT, arXiv 2605.07711).

Both token sequences are laid out by byte offset and cut wherever both have a boundary. In a segment of one token on
each side the two distributions are compared on the student's ids. A longer segment adds one slot, the
joint probability of its own tokens, beside those ids at its first position. Left out: tokens after the last common
boundary, and special tokens but the end of a turn. The identity when the tokenizers agree.

The published code scores a long segment by the mean raw logit of its tokens; here it is the sum of their log-probs
(the joint probability), so that adding a constant to all logits of a position changes nothing. It drops teacher ids
that the student lacks; ``first_ids`` counts them for the id they begin with, or a student would lose those texts.

N tokens, K slots; ``segment_N`` numbers a row's segments from 0, -1 outside all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Segment(NamedTuple):
    """The same bytes on both sides: half-open token ranges."""

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def one_to_one(self) -> bool:
        """One token on each side."""
        return self.student[1] - self.student[0] == 1 == self.teacher[1] - self.teacher[0]


def align_bytes(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Segment]:
    """Finest segments on which both token sequences spell the same bytes, in order.

    Nothing is aligned after the first byte that differs (a character cut in two, say), nor after the last boundary
    that both sides have.
    """
    common = _common_prefix(b"".join(student), b"".join(teacher))
    # The last token ending at an offset wins, so that empty pieces belong to the token before them.
    ends = [dict(zip(np.cumsum([len(piece) for piece in side]).tolist(), range(1, len(side) + 1), strict=True))
            for side in (student, teacher)]  # fmt: skip
    segments, start = [], (0, 0)
    for offset in sorted(ends[0].keys() & ends[1].keys()):
        if offset > common:
            break
        end = (ends[0][offset], ends[1][offset])
        if offset > 0:
            segments.append(Segment((start[0], end[0]), (start[1], end[1])))
        start = end
    return segments


def _common_prefix(one: bytes, other: bytes) -> int:
    """Number of leading bytes that are equal."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size))
    return int(differ[0]) if len(differ) else size


def shared_ids(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> IntArray:
    """For each teacher id the student's id with the same bytes, or -1; shape (V_T,).

    ``None`` marks ids to leave out (special tokens, padding rows). The first of several ids with equal bytes counts.
    """
    ours = _by_bytes(student)
    taken: set[int] = set()
    table = np.full(len(teacher), -1, np.int64)
    for index, piece in enumerate(teacher):
        match = ours.get(piece, -1) if piece else -1
        if match >= 0 and match not in taken:
            table[index] = match
            taken.add(match)
    return table


def first_ids(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], encode: Callable[[str], Sequence[int]]
) -> IntArray:
    """For each teacher id the student's id that its bytes begin with, or -1; shape (V_T,).

    The same token where both have it, else the first that ``encode`` gives for its text, else the longest that fits.
    """
    ours, table = _by_bytes(student), shared_ids(student, teacher)
    for index in np.flatnonzero(table < 0).tolist():
        if piece := teacher[index]:
            first = next(iter(encode(piece.decode(errors="ignore"))), -1)
            begun = student[first] if first >= 0 else None
            table[index] = first if begun and piece.startswith(begun) else _longest(piece, ours)
    return table


def _by_bytes(pieces: Sequence[bytes | None]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for index, piece in enumerate(pieces):
        if piece:
            found.setdefault(piece, index)
    return found


def _longest(piece: bytes, ids: Mapping[bytes, int]) -> int:
    """Id of the longest prefix that has one, or -1."""
    return next((ids[piece[:size]] for size in range(len(piece), 0, -1) if piece[:size] in ids), -1)


def translate(ids_K: IntArray, logprobs_K: FloatArray, table: IntArray) -> tuple[IntArray, FloatArray]:
    """Teacher's top-K as student ids, ascending, the mass of those with one id together; unused slots are (0, -inf)."""
    found_K = np.where(np.isfinite(logprobs_K), table[ids_K], -1)
    ids_K, mass_K = np.zeros_like(ids_K), np.full_like(logprobs_K, -np.inf)
    chosen, slot = np.unique(found_K[found_K >= 0], return_inverse=True)
    ids_K[: len(chosen)] = chosen
    np.logaddexp.at(mass_K, slot, logprobs_K[found_K >= 0])
    return ids_K, mass_K


def segment_logprobs(logprobs_N: Tensor, row_N: Tensor, segment_N: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-prob of each token's whole segment (N,), and whether that has several student tokens (N,).

    Outside segments and in segments of one token it is the token's own log-prob. Differentiable.
    """
    inside = (segment_N >= 0).nonzero().squeeze(1)
    if not len(inside):
        return logprobs_N, torch.zeros_like(logprobs_N, dtype=torch.bool)
    stride = int(segment_N.max()) + 1
    _, group = torch.unique(row_N[inside] * stride + segment_N[inside], return_inverse=True)
    zeros = logprobs_N.new_zeros(int(group.max()) + 1)
    total = zeros.index_add(0, group, logprobs_N[inside])
    size = zeros.index_add(0, group, torch.ones_like(logprobs_N[inside]))
    several_N = torch.zeros_like(logprobs_N, dtype=torch.bool).index_put((inside,), size[group] > 1)
    return logprobs_N.index_put((inside,), total[group]), several_N


def with_span_slot(
    student_NK: Tensor, teacher_NK: Tensor, spans_N2: Tensor, is_span_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Both supports with the segment's own slot appended, (N, K+1); ``-inf`` on the teacher's side marks it unused.

    ``spans_N2`` holds the segment's score for student and teacher, ``is_span_N`` the segments of several tokens.
    """
    ours_N, theirs_N = spans_N2.unbind(-1)
    student = torch.cat([student_NK, ours_N[:, None]], dim=-1)
    return student, torch.cat([teacher_NK, torch.where(is_span_N, theirs_N, -torch.inf)[:, None]], dim=-1)
