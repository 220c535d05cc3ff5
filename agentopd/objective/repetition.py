"""Loops: a tail that repeats itself, as ids to mask and as text to count.

The rate is Stable-OPD's (arXiv 2604.08527): a text repeats when its last 10,000 characters shrink more than tenfold
under zlib; shorter texts never do. The mask is a DESIGN: the longest suffix that has a short period, from its second
period on, so that one whole round of the loop stays supervised.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

TAIL_CHARS = 10_000
MAX_RATIO = 10.0
MAX_PERIOD = 64
MIN_ROUNDS = 4
"""A tail is a loop from this many rounds on."""
MIN_TOKENS = 32
"""Shorter tails are never a loop: a row of dashes is not one."""


def repeats(text: str, tail_chars: int = TAIL_CHARS, max_ratio: float = MAX_RATIO) -> bool:
    """Whether the last ``tail_chars`` characters are a loop; a text that is not longer than that never is."""
    if len(text) <= tail_chars:
        return False
    tail = text[-tail_chars:].encode()
    return len(tail) / len(zlib.compress(tail)) > max_ratio


def looping_tail(ids: Sequence[int]) -> int:
    """Number of tokens at the end that only repeat a period of at most 64 ids (0: no loop).

    The loop's first round is not counted.
    """
    best = 0
    for period in range(1, min(MAX_PERIOD, len(ids) // MIN_ROUNDS) + 1):
        run = 0
        while run < len(ids) - period and ids[-1 - run] == ids[-1 - run - period]:
            run += 1
        if run >= (MIN_ROUNDS - 1) * period and run + period >= MIN_TOKENS:
            best = max(best, run)
    return best
