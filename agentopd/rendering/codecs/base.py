"""What all tool-call codecs share: where to look for calls, the limits, and what becomes of a call that is broken.

A codec never guesses: text is a call, a malformed call (kept verbatim, with the reason), or prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from agentopd.types import MalformedCall, ToolCall, ToolSchema

_MAX_RAW = 2000
"""Characters of a malformed call that are kept: enough to see what went wrong."""
_THINK, _UNTHINK = "<think>", "</think>"


@runtime_checkable
class ToolCodec(Protocol):
    """One way of writing tool calls.

    ``tools`` are the schemas on offer. A format that writes values without their types needs them; the others ignore
    them.
    """

    name: ClassVar[str]

    def parse(
        self, text: str, tools: Sequence[ToolSchema] = ()
    ) -> tuple[tuple[ToolCall, ...], tuple[MalformedCall, ...]]:
        """The calls of one assistant turn, in order, and what looked like calls but was not; never raises."""
        ...

    def render(self, *calls: ToolCall, tools: Sequence[ToolSchema] = ()) -> str:
        """The calls as a student has to write them; ``parse(render(*calls, tools=tools), tools)`` gives them back."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character ranges [start, end) of the calls in ``text``, malformed ones included."""
        ...


def call_spans(
    text: str, codec: ToolCodec, num_calls: int, num_malformed: int, tools: Sequence[ToolSchema] = ()
) -> tuple[tuple[int, int], ...]:
    """Character ranges of a turn's calls, then of its malformed calls; () if the codec's ranges do not tell."""
    spans = codec.spans(text)
    if len(spans) != num_calls + num_malformed:
        return ()
    if not num_malformed:
        return tuple(spans)
    # A call can be malformed by where it stands (too many, an unclosed think block); those come last.
    calls = [span for span in spans if codec.parse(text[slice(*span)], tools)[0]][:num_calls]
    rest = [span for span in spans if span not in calls]
    return (*calls, *rest) if len(calls) == num_calls else ()


@dataclass(frozen=True)
class Found:
    """One stretch of text that holds calls, or, with a ``reason``, none that can be carried out."""

    start: int
    end: int
    calls: tuple[ToolCall, ...] = ()
    reason: str = ""


class BlockCodec:
    """Base of codecs whose calls open with a mark and end where their own grammar says so.

    Declared behaviour where formats leave room:

    - everything inside ``<think>…</think>`` (or before a ``</think>`` whose opening was part of the prompt) is prose;
      a call in a think block that is never closed is malformed;
    - a block longer than ``max_chars``, nested deeper than ``max_depth``, or that goes beyond ``max_calls`` calls in
      the turn: malformed;
    - what a broken call holds is never carried out.
    """

    opening: ClassVar[re.Pattern[str]]
    """Where a block of calls begins."""

    def __init__(self, max_calls: int = 128, max_chars: int = 4 * 2**20, max_depth: int = 64) -> None:
        self.max_calls = max_calls
        self.max_chars = max_chars
        self.max_depth = max_depth

    def parse(
        self, text: str, tools: Sequence[ToolSchema] = ()
    ) -> tuple[tuple[ToolCall, ...], tuple[MalformedCall, ...]]:
        """Calls and malformed calls of one assistant turn, each in order of appearance."""
        found = self._scan(text, tools)
        calls = tuple(call for item in found for call in item.calls)
        malformed = tuple(
            MalformedCall(raw=_clip(text[item.start : item.end]), reason=item.reason) for item in found if item.reason
        )
        return calls, malformed

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of the blocks, well-formed or not."""
        return [(item.start, item.end) for item in self._scan(text, ())]

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> Found | None:
        """Read the block that opens at ``start``; None where it turns out to be prose."""
        raise NotImplementedError

    def _scan(self, text: str, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        marks = re.compile(f"(?P<think>{_THINK})|(?P<unthink>{_UNTHINK})|{self.opening.pattern}", re.MULTILINE)
        position, thought, count = 0, False, 0
        while (mark := marks.search(text, position)) is not None:
            position = mark.end()
            if mark["think"]:
                end = text.find(_UNTHINK, mark.end())
                if end < 0:
                    return found + list(self._unclosed(text, mark.end()))
                position, thought = end + len(_UNTHINK), True
            elif mark["unthink"]:
                # The opening <think> was part of the prompt: what came before this is thought, not action.
                if not thought:
                    found.clear()
                    count = 0
                thought = True
            elif (item := self.read(text, mark.start(), tools)) is not None:
                count += max(len(item.calls), 1)
                if count > self.max_calls:
                    return [*found, Found(item.start, len(text), (), f"more than {self.max_calls} calls in one turn")]
                found.append(item)
                position = max(item.end, mark.end())
        return found

    def _unclosed(self, text: str, start: int) -> Iterator[Found]:
        opening = re.compile(self.opening.pattern, re.MULTILINE).search(text, start)
        if opening is not None:
            reason = f"a call inside a {_THINK} block that is never closed"
            yield Found(opening.start(), len(text), reason=reason)


def _clip(raw: str) -> str:
    return raw if len(raw) <= _MAX_RAW else raw[:_MAX_RAW] + "…"
