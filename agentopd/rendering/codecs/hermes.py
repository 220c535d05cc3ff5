"""``<tool_call>`` blocks holding one JSON object each, as Hermes and Qwen models write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from agentopd.rendering.codecs.base import BlockCodec, Found
from agentopd.rendering.codecs.plain_json import DECODER, check_plain, dump, kind, reason
from agentopd.types import ToolCall, ToolSchema

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CLOSING = re.compile(rf"\s*{_CLOSE}")


class HermesJSON(BlockCodec):
    """``<tool_call>`` blocks holding one JSON object each.

    Declared behaviour where the format leaves room, beside that of ``BlockCodec``:

    - the object is decoded from its first brace, so ``</tool_call>`` inside a string argument ends nothing;
    - JSON outside ``<tool_call>`` is prose;
    - ``arguments`` may be an object, a string holding one, or absent (no arguments); nothing else, and no other keys;
    - duplicate keys, NaN, infinities, numbers too large for a float (or for Python's integer limit), lone surrogates,
      a second object in the block, a missing ``</tool_call>``: malformed.

    After a call whose JSON cannot be decoded, reading resumes behind the next ``</tool_call>``.
    """

    name: ClassVar[str] = "hermes_json"
    opening = re.compile(_OPEN)

    def render(self, *calls: ToolCall, tools: Sequence[ToolSchema] = ()) -> str:
        """``<tool_call>``, one line of JSON, ``</tool_call>``, on three lines for each call."""
        bodies = (dump({"name": call.name, "arguments": call.arguments}) for call in calls)
        return "\n".join(f"{_OPEN}\n{body}\n{_CLOSE}" for body in bodies)

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> Found:
        """Read the call that opens at ``start``."""
        begin = start + len(_OPEN)
        while begin < len(text) and text[begin].isspace():
            begin += 1
        # A slice bounds the work; one character more than allowed tells too long from cut off.
        window = text[begin : begin + self.max_chars + 1]
        try:
            body, length = DECODER.raw_decode(window)
            call = call_of(body, self.max_depth)
        except (ValueError, RecursionError) as exc:
            why = f"longer than {self.max_chars} characters" if len(window) > self.max_chars else reason(exc)
            return Found(start, _after_close(text, begin), reason=why)
        end = begin + length
        if length > self.max_chars:
            return Found(start, _after_close(text, end), reason=f"longer than {self.max_chars} characters")
        closing = _CLOSING.match(text, end)
        if closing is None:
            cut = not text[end:].strip()
            return Found(start, end, reason=f"{_CLOSE} is missing" if cut else "text after the call object")
        return Found(start, closing.end(), (call,))


def call_of(body: Any, max_depth: int) -> ToolCall:
    """A decoded ``{"name", "arguments"}`` object as a call; every complaint is a ``ValueError``."""
    if not isinstance(body, dict):
        raise ValueError(f"a call must be a JSON object, not {kind(body)}")
    for key in body:
        if key not in ("name", "arguments"):
            raise ValueError(f"unexpected key {key!r}; a call has 'name' and 'arguments'")
    name, arguments = body.get("name"), body.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError("'name' must be a non-empty string")
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"'arguments' must be a JSON object, not {kind(arguments)}")
    check_plain([name, arguments], max_depth + 1)
    return ToolCall(name=name, arguments=arguments)


def _loads(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except ValueError as exc:
        raise ValueError(f"'arguments' is a string that does not hold a JSON object: {reason(exc)}") from None


def _after_close(text: str, start: int) -> int:
    end = text.find(_CLOSE, start)
    return len(text) if end < 0 else end + len(_CLOSE)
