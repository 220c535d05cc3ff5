"""Where the teacher stops being worth listening to (Prefix Teach, Suffix Fade; arXiv 2605.13643, RECONSTRUCTED).

The margin of a token is how clearly the teacher tells the student's own best candidates apart: the difference of its
two largest log-probs among them. Margins are averaged over segments (turns, or sentences of a single turn), and one
downward step is looked for: two means against one, by the Bayesian information criterion, ``n log(RSS_0 / n) + log n``
against ``n log(RSS_1 / n) + 3 log n``. From the step on the teacher term is off; no step leaves it on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

RSS_FLOOR = 1e-12
"""Least mean squared residual, so that a perfect fit has a logarithm."""

Array = npt.NDArray[Any]


def margins(candidate_logprobs: Array) -> Array:
    """Difference of the two largest teacher log-probs among the student's candidates (n, K) -> (n,)."""
    top = np.sort(candidate_logprobs, axis=-1)[:, -2:]
    return np.where(np.isfinite(top).all(-1), top[:, 1] - top[:, 0], 0.0)


def bic(values: Sequence[float], parameters: int, *cuts: int) -> float:
    """``n log(RSS / n) + parameters log n`` of a piecewise constant fit with steps before each of ``cuts``."""
    n, bounds = len(values), [0, *cuts, len(values)]
    pieces = [np.asarray(values[a:b], float) for a, b in pairwise(bounds)]
    rss = sum(float(((piece - piece.mean()) ** 2).sum()) for piece in pieces)
    return n * math.log(max(rss / n, RSS_FLOOR)) + parameters * math.log(n)


def change_point(values: Sequence[float], min_side: int = 1) -> int | None:
    """First segment after the best downward step, or None where one mean explains the series as well."""
    n = len(values)
    cuts = [t for t in range(min_side, n - min_side + 1) if np.mean(values[:t]) > np.mean(values[t:])] if n > 1 else []
    if not cuts:
        return None
    best = min(cuts, key=lambda cut: bic(values, 3, cut))
    return best if bic(values, 3, best) < bic(values, 1) else None


def fade_from(margin: Array, segment: Array, min_keep: float) -> int:
    """Index of the first token whose teacher term is off (n: none is), at least ``min_keep`` of them kept.

    ``margin`` and ``segment`` are (n,); segment numbers do not decrease.
    """
    n = len(margin)
    starts = np.flatnonzero(np.diff(segment, prepend=segment[0] - 1 if n else 0))
    means = [float(piece.mean()) for piece in np.split(margin, starts[1:])] if n else []
    found = change_point(means)
    return n if found is None else max(int(starts[found]), math.ceil(min_keep * n))
