"""How tool calls are written in text, and how what a student wrote is read back.

A codec never guesses: text is a call, a malformed call (kept verbatim, with the reason), or prose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

from agentopd.types import MalformedCall, ToolCall

_MAX_RAW = 2000
"""Characters of a malformed call that are kept: enough to see what went wrong."""


@runtime_checkable
class ToolCodec(Protocol):
    """One way of writing tool calls."""

    name: ClassVar[str]

    def parse(self, text: str) -> tuple[tuple[ToolCall, ...], tuple[MalformedCall, ...]]:
        """The calls of one assistant turn, in order, and what looked like calls but was not; never raises."""
        ...

    def render(self, call: ToolCall) -> str:
        """The call as a student has to write it; ``parse(render(call))`` gives the call back."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character ranges [start, end) of the calls in ``text``, malformed ones included."""
        ...


def call_spans(text: str, codec: ToolCodec, num_calls: int, num_malformed: int) -> tuple[tuple[int, int], ...]:
    """Character ranges of a turn's calls, then of its malformed calls; () if the codec's ranges do not tell."""
    spans = codec.spans(text)
    if len(spans) != num_calls + num_malformed:
        return ()
    if not num_malformed:
        return tuple(spans)
    # A call can be malformed by where it stands (too many, an unclosed think block); those come last.
    calls = [span for span in spans if codec.parse(text[slice(*span)])[0]][:num_calls]
    rest = [span for span in spans if span not in calls]
    return (*calls, *rest) if len(calls) == num_calls else ()


@dataclass(frozen=True)
class _Found:
    start: int
    end: int
    call: ToolCall | None = None
    reason: str = ""


class HermesJSON:
    """``<tool_call>`` blocks holding one JSON object each, as Hermes and Qwen models write them.

    Declared behaviour where the format leaves room:

    - the object is decoded from its first brace, so ``</tool_call>`` inside a string argument ends nothing;
    - JSON outside ``<tool_call>`` is prose, and so is everything inside ``<think>…</think>`` (or before a ``</think>``
      whose opening was part of the prompt); a call in a think block that is never closed is malformed;
    - ``arguments`` may be an object, a string holding one, or absent (no arguments); nothing else, and no other keys;
    - duplicate keys, NaN, infinities, numbers too large for a float (or for Python's integer limit), lone surrogates,
      a second object in the block, a missing ``</tool_call>``: malformed;
    - a call longer than ``max_chars``, nested deeper than ``max_depth``, or beyond the first ``max_calls``: malformed.

    After a call whose JSON cannot be decoded, reading resumes behind the next ``</tool_call>``: what a broken call
    holds is never executed.
    """

    name: ClassVar[str] = "hermes_json"

    def __init__(self, max_calls: int = 32, max_chars: int = 65536, max_depth: int = 64) -> None:
        self.max_calls = max_calls
        self.max_chars = max_chars
        self.max_depth = max_depth

    def parse(self, text: str) -> tuple[tuple[ToolCall, ...], tuple[MalformedCall, ...]]:
        """Calls and malformed calls of one assistant turn, each in order of appearance."""
        found = self._scan(text)
        calls = tuple(item.call for item in found if item.call is not None)
        malformed = tuple(
            MalformedCall(raw=_clip(text[item.start : item.end]), reason=item.reason)
            for item in found
            if item.call is None
        )
        return calls, malformed

    def render(self, call: ToolCall) -> str:
        """``<tool_call>``, one line of JSON, ``</tool_call>``, on three lines."""
        body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False, allow_nan=False)
        return f"{_OPEN}\n{body}\n{_CLOSE}"

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Character ranges of the calls, well-formed or not, from ``<tool_call>`` to ``</tool_call>``."""
        return [(item.start, item.end) for item in self._scan(text)]

    def _scan(self, text: str) -> list[_Found]:
        found: list[_Found] = []
        position, thought = 0, False
        while (mark := _MARK.search(text, position)) is not None:
            if mark.group() == _OPEN:
                item = self._one(text, mark.start())
                if len(found) == self.max_calls:
                    item = _Found(item.start, len(text), reason=f"more than {self.max_calls} calls in one turn")
                found.append(item)
                position = item.end
            elif mark.group() == _THINK:
                end = text.find(_UNTHINK, mark.end())
                if end < 0:
                    return found + list(_unclosed(text, mark.end()))
                position, thought = end + len(_UNTHINK), True
            else:
                # The opening <think> was part of the prompt: what came before this is thought, not action.
                if not thought:
                    found.clear()
                position, thought = mark.end(), True
        return found

    def _one(self, text: str, start: int) -> _Found:
        """Read the call that opens at ``start``."""
        begin = start + len(_OPEN)
        while begin < len(text) and text[begin].isspace():
            begin += 1
        # A slice bounds the work; one character more than allowed tells too long from cut off.
        window = text[begin : begin + self.max_chars + 1]
        try:
            body, length = _DECODER.raw_decode(window)
            call = self._call(body)
        except (ValueError, RecursionError) as exc:
            reason = _reason(exc)
            if len(window) > self.max_chars:
                reason = f"longer than {self.max_chars} characters"
            return _Found(start, _after_close(text, begin), reason=reason)
        end = begin + length
        if length > self.max_chars:
            return _Found(start, _after_close(text, end), reason=f"longer than {self.max_chars} characters")
        closing = _CLOSING.match(text, end)
        if closing is None:
            cut = not text[end:].strip()
            return _Found(start, end, reason=f"{_CLOSE} is missing" if cut else "text after the call object")
        return _Found(start, closing.end(), call=call)

    def _call(self, body: Any) -> ToolCall:
        """Check the decoded object; every complaint is a ``ValueError``."""
        if not isinstance(body, dict):
            raise ValueError(f"a call must be a JSON object, not {_kind(body)}")
        for key in body:
            if key not in ("name", "arguments"):
                raise ValueError(f"unexpected key {key!r}; a call has 'name' and 'arguments'")
        name, arguments = body.get("name"), body.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise ValueError("'name' must be a non-empty string")
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"'arguments' must be a JSON object, not {_kind(arguments)}")
        _check_depth(arguments, self.max_depth)
        try:
            (name + json.dumps(arguments, ensure_ascii=False)).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None
        return ToolCall(name=name, arguments=arguments)


_OPEN, _CLOSE, _THINK, _UNTHINK = "<tool_call>", "</tool_call>", "<think>", "</think>"
_MARK = re.compile(f"{_OPEN}|{_THINK}|{_UNTHINK}")
_CLOSING = re.compile(rf"\s*{_CLOSE}")


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"number {text[:20]}… is too large") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return table


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer
)


def _loads(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except ValueError as exc:
        raise ValueError(f"'arguments' is a string that does not hold a JSON object: {_reason(exc)}") from None


def _reason(exc: Exception) -> str:
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, json.JSONDecodeError):
        return f"invalid JSON: {exc.msg} at character {exc.pos}"
    return str(exc)


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError("nested too deeply")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _check_depth(item, left - 1)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _after_close(text: str, start: int) -> int:
    end = text.find(_CLOSE, start)
    return len(text) if end < 0 else end + len(_CLOSE)


def _unclosed(text: str, start: int) -> Iterator[_Found]:
    opening = text.find(_OPEN, start)
    if opening >= 0:
        yield _Found(opening, len(text), reason=f"a call inside a {_THINK} block that is never closed")


def _clip(raw: str) -> str:
    return raw if len(raw) <= _MAX_RAW else raw[:_MAX_RAW] + "…"
