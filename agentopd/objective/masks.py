"""Which sampled tokens the teacher term leaves out.

Role and end-of-turn markers carry the chat format, not the skill: a teacher's opinion on them is style. They are
recognised by id on every turn, and the verifier's term keeps them. A truncated episode may also hide its last tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

TAIL_SHARE = 0.1
"""Share of a truncated episode's sampled tokens, at its end, that ``mask_tail`` hides."""


@dataclass(frozen=True)
class TokenClasses:
    """Per token of one turn: is it a role or end-of-turn marker, and is it inside a tool call."""

    special: tuple[bool, ...]
    in_span: tuple[bool, ...]


ClassifyTokens = Callable[[Sequence[int]], TokenClasses]
"""Classes of the ids of one turn."""


def token_classifier(
    special_ids: Collection[int], span_open: int | None = None, span_close: int | None = None
) -> ClassifyTokens:
    """A classifier by id. A span runs from ``span_open`` to ``span_close``, both included, or to the turn's end."""

    def classify(ids: Sequence[int]) -> TokenClasses:
        in_span, inside = [], False
        for token in ids:
            inside = inside or token == span_open
            in_span.append(inside and span_open is not None)
            inside = inside and token != span_close
        return TokenClasses(tuple(token in special_ids for token in ids), tuple(in_span))

    return classify


def no_token_classes(ids: Sequence[int]) -> TokenClasses:
    """The classifier that finds neither markers nor spans."""
    return TokenClasses((False,) * len(ids), (False,) * len(ids))


def hidden_tail(num_sampled: int) -> int:
    """Number of tokens ``mask_tail`` hides at the end of a truncated episode of ``num_sampled`` tokens."""
    return math.ceil(TAIL_SHARE * num_sampled)
