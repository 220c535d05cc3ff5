"""The ``tool_calls`` field of an OpenAI-style chat message, as one JSON object on a line of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from agentopd.rendering.codecs.base import BlockCodec, Found
from agentopd.rendering.codecs.hermes import call_of
from agentopd.rendering.codecs.plain_json import DECODER, dump, kind, reason
from agentopd.types import ToolCall, ToolSchema


class OpenAI(BlockCodec):
    """``{"tool_calls": [{"id", "type": "function", "function": {"name", "arguments"}}, …]}``.

    For models without a tool format of their own, and for servers that hand tool calls back as this field. Declared
    behaviour, beside that of ``BlockCodec``:

    - the object begins a line and ``tool_calls`` is its first key; any other JSON is prose;
    - ``arguments`` is an object or a string holding one; ``id`` and ``type`` may be left out, other keys may not be
      added;
    - the calls of one object stand and fall together: one that is malformed makes the object malformed;
    - text behind the object on its last line, or an object that does not end: malformed, to the end of the turn.
    """

    name: ClassVar[str] = "openai"
    opening = re.compile(r'^[ \t]*\{\s*"tool_calls"\s*:')

    def render(self, *calls: ToolCall, tools: Sequence[ToolSchema] = ()) -> str:
        """One line of JSON; ids count the calls, arguments are a string as the API has them."""
        items = [
            {"id": f"call_{index}", "type": "function", "function": {"name": c.name, "arguments": dump(c.arguments)}}
            for index, c in enumerate(calls)
        ]
        return dump({"tool_calls": items}) if items else ""

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> Found:
        """Read the object that opens at ``start``."""
        begin = text.index("{", start)
        window = text[begin : begin + self.max_chars + 1]
        try:
            body, length = DECODER.raw_decode(window)
            if length > self.max_chars:
                raise ValueError
            calls = self._calls(body)
        except (ValueError, RecursionError) as exc:
            why = f"longer than {self.max_chars} characters" if len(window) > self.max_chars else reason(exc)
            return Found(begin, len(text), reason=why)
        end = begin + length
        if text[end:].partition("\n")[0].strip():
            return Found(begin, len(text), reason="text after the object of calls")
        return Found(begin, end, calls)

    def _calls(self, body: Any) -> tuple[ToolCall, ...]:
        if set(body) != {"tool_calls"}:
            raise ValueError(f"unexpected key {next(key for key in body if key != 'tool_calls')!r} beside 'tool_calls'")
        items = body["tool_calls"]
        if not isinstance(items, list) or not items:
            raise ValueError(f"'tool_calls' must be an array of calls, not {kind(items)}")
        return tuple(self._call(item) for item in items)

    def _call(self, item: Any) -> ToolCall:
        if not isinstance(item, dict) or "function" not in item:
            raise ValueError("each of 'tool_calls' must be an object with 'function'")
        for key in item:
            if key not in ("id", "type", "function"):
                raise ValueError(f"unexpected key {key!r}; a call has 'id', 'type' and 'function'")
        if item.get("type", "function") != "function":
            raise ValueError(f"'type' must be 'function', not {item['type']!r}")
        return call_of(item["function"], self.max_depth)
