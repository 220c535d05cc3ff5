"""From what a judge knows of single steps to certificates that name turn and tokens.

A step is a piece of a turn's text (a call, a line) with a sign: +1 good, -1 bad, 0 not known. Where a turn's record
tells which tokens wrote which text, each known step is certified on its own tokens. Where it does not, a whole turn is
certified only if the same is known of all its steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from agentopd.types import Episode, Event, StepCertificate

Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Step:
    """What is known of characters [start, end) of a turn's text; ``span`` None: which characters is not known."""

    turn: int
    sign: Sign
    kind: str
    span: tuple[int, int] | None = None
    detail: str = ""


@dataclass(frozen=True)
class Call:
    """A call that the environment recorded, and where the turn's text makes it."""

    event: Event
    span: tuple[int, int] | None

    @property
    def ok(self) -> bool:
        """Whether the environment carried it out."""
        return bool(self.event.data.get("ok"))


def recorded_calls(episode: Episode) -> list[Call]:
    """The ``tool_call`` events in order; an environment answers the calls of a turn in the order they were made."""
    found: list[Call] = []
    seen: dict[int, int] = {}
    for event in episode.events:
        if event.kind == "tool_call":
            index = seen.get(event.turn, 0)
            seen[event.turn] = index + 1
            found.append(Call(event, _call_span(episode, event, index)))
    return found


def malformed_steps(episode: Episode) -> Iterator[Step]:
    """Every call that could not be parsed is a bad step."""
    for index, turn in enumerate(episode.turns):
        spans = turn.call_spans[len(turn.tool_calls) :] or (None,) * len(turn.malformed)
        for call, span in zip(turn.malformed, spans, strict=True):
            yield Step(index, -1, "malformed_call", span, call.reason)


def certify(episode: Episode, steps: Sequence[Step]) -> list[StepCertificate]:
    """Certificates of the steps whose sign is known; by turn, in the order given."""
    found: list[StepCertificate] = []
    for turn in sorted({step.turn for step in steps}):
        mine = [step for step in steps if step.turn == turn]
        placed = [(step, _tokens(episode, step)) for step in mine]
        if all(tokens for _, tokens in placed):
            found += [_certificate(step, *tokens) for step, tokens in placed if step.sign and tokens]
        elif mine[0].sign and all(step.sign == mine[0].sign for step in mine):
            found.append(_certificate(mine[0], 0, None))
    return found


def _call_span(episode: Episode, event: Event, index: int) -> tuple[int, int] | None:
    if not 0 <= event.turn < len(episode.turns):
        return None
    turn = episode.turns[event.turn]
    same = index < len(turn.tool_calls) and turn.tool_calls[index].name == event.data.get("name")
    return turn.call_spans[index] if same and turn.call_spans else None


def _tokens(episode: Episode, step: Step) -> tuple[int, int] | None:
    return None if step.span is None else episode.turns[step.turn].token_span(*step.span)


def _certificate(step: Step, start: int, end: int | None) -> StepCertificate:
    sign: Literal[-1, 1] = 1 if step.sign > 0 else -1
    return StepCertificate(turn=step.turn, sign=sign, kind=step.kind, start=start, end=end, detail=step.detail)
