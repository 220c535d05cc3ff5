"""A token classifier by id, for tests without a chat template."""

from collections.abc import Collection, Sequence

from agentopd.objective.masks import ClassifyTokens, TokenClasses


def token_classifier(
    special_ids: Collection[int], span_open: int | None = None, span_close: int | None = None
) -> ClassifyTokens:
    """A span runs from ``span_open`` to ``span_close``, both included, or to the turn's end."""

    def classify(ids: Sequence[int]) -> TokenClasses:
        in_span, inside = [], False
        for token in ids:
            inside = inside or token == span_open
            in_span.append(inside and span_open is not None)
            inside = inside and token != span_close
        return TokenClasses(tuple(token in special_ids for token in ids), tuple(in_span))

    return classify
