"""``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``, as Qwen3-Coder writes calls.

The format has neither types nor escapes, so both are declared here. A parameter whose schema is a plain string is its
text, verbatim. Any other one (and every one whose schema is not known) is JSON where it decodes as JSON, else text;
``render`` quotes a string that would otherwise be read as something else. A closing tag inside a value is written with
``&lt;``, as in ``&lt;/parameter>``; nothing else is escaped, so code stays readable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from agentopd.rendering.codecs.base import BlockCodec, Found
from agentopd.rendering.codecs.plain_json import DECODER, check_plain, dump, reason
from agentopd.types import ToolCall, ToolSchema

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_END = re.compile(rf"\s*</function>\s*{_CLOSE}")
_VALUE_END = "</parameter>"
_TO_ESCAPE = re.compile(r"<(?=/parameter>)|&(?:amp;)*lt;(?=/parameter>)")
_ESCAPED = re.compile(r"&((?:amp;)*)lt;(?=/parameter>)")
_Known = Mapping[str, Any]


class Qwen3XML(BlockCodec):
    """Declared behaviour beside that of the module and of ``BlockCodec``.

    - a value ends at ``</parameter>`` and nowhere else: ``</tool_call>`` inside one ends nothing;
    - one newline after the opening and one before the closing tag belong to the format, further ones to the value;
    - a parameter given twice, text between parameters, a tag that is missing: malformed;
    - names hold neither ``>`` nor a newline; ``render`` refuses those that do (``ValueError``).

    After a broken call reading resumes behind the next ``</tool_call>``.
    """

    name: ClassVar[str] = "qwen3_xml"
    opening = re.compile(_OPEN)

    def render(self, *calls: ToolCall, tools: Sequence[ToolSchema] = ()) -> str:
        """One block for each call, one line for each tag, values as they are."""
        return "\n".join(self._render(call, _properties(call.name, tools)) for call in calls)

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> Found:
        """Read the call that opens at ``start``."""
        try:
            call, end = self._read(text, start + len(_OPEN), tools)
        except (ValueError, RecursionError) as exc:
            close = text.find(_CLOSE, start)
            return Found(start, len(text) if close < 0 else close + len(_CLOSE), reason=reason(exc))
        if end - start > self.max_chars:
            return Found(start, end, reason=f"longer than {self.max_chars} characters")
        return Found(start, end, (call,))

    def _read(self, text: str, position: int, tools: Sequence[ToolSchema]) -> tuple[ToolCall, int]:
        function = _FUNCTION.match(text, position)
        if function is None:
            raise ValueError(f"{_OPEN} must be followed by <function=NAME>")
        name, position = function[1], function.end()
        known, arguments = _properties(name, tools), dict[str, Any]()
        while (parameter := _PARAMETER.match(text, position)) is not None:
            key = parameter[1]
            end = text.find(_VALUE_END, parameter.end())
            if end < 0:
                raise ValueError(f"parameter {key!r} has no {_VALUE_END}")
            if key in arguments:
                raise ValueError(f"duplicate parameter {key!r}")
            arguments[key] = _value(text[parameter.end() : end].removesuffix("\n"), known.get(key))
            position = end + len(_VALUE_END)
        closing = _END.match(text, position)
        if closing is None:
            raise ValueError(f"</function>{_CLOSE} is missing, or something stands before it")
        check_plain([name, arguments], self.max_depth + 1)
        return ToolCall(name=name, arguments=arguments), closing.end()

    def _render(self, call: ToolCall, known: _Known) -> str:
        for name in (call.name, *call.arguments):
            if not name or ">" in name or "\n" in name:
                raise ValueError(f"{name!r} cannot be a name in {self.name}: it is empty, or holds '>' or a newline")
        values = ((key, _text(value, known.get(key))) for key, value in call.arguments.items())
        lines = [f"<parameter={key}>\n{text}\n{_VALUE_END}" for key, text in values]
        return "\n".join([_OPEN, f"<function={call.name}>", *lines, "</function>", _CLOSE])


def _properties(name: str, tools: Sequence[ToolSchema]) -> _Known:
    """The schemas of a tool's parameters; nothing where the tool is not known."""
    for tool in tools:
        if tool.name == name:
            properties: _Known = tool.parameters.get("properties", {})
            return properties
    return {}


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


def _value(text: str, schema: Any) -> Any:
    plain = _ESCAPED.sub(lambda found: f"&{found[1][4:]}lt;" if found[1] else "<", text)
    return plain if _is_text(schema) else _decoded(plain)


def _decoded(text: str) -> Any:
    """The JSON value of a text, or the text where it is not strict JSON."""
    try:
        return DECODER.decode(text)
    except ValueError:
        return text


def _text(value: Any, schema: Any) -> str:
    plain = value if isinstance(value, str) else dump(value)
    if isinstance(value, str) and not _is_text(schema) and _decoded(value) is not value:
        plain = dump(value)
    return _TO_ESCAPE.sub(lambda found: "&lt;" if found[0] == "<" else f"&amp;{found[0][1:]}", plain)
