"""``[search(query="figs", k=3), stop()]``: Python call syntax, as Llama models write it. Parsed, never evaluated."""

from __future__ import annotations

import ast
import keyword
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from agentopd.rendering.codecs.base import BlockCodec, Found
from agentopd.rendering.codecs.plain_json import check_plain
from agentopd.types import ToolCall, ToolSchema

_BRACKETS = {"[": 1, "(": 1, "{": 1, "]": -1, ")": -1, "}": -1}
_PIECE = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"""|"(?:[^"\\\n]++|\\.)*+"'
    r"|'''(?:[^'\\]++|\\.|'(?!''))*+'''|'(?:[^'\\\n]++|\\.)*+'"
    r"|[\[\](){}\"']",
    re.DOTALL,
)
"""A string, a bracket, or a quote that opens a string without an end."""
_NAME = r"(?:[^\W\d]\w*(?:\.[^\W\d]\w*)*|\"(?:[^\"\\\n]|\\.)+\"|'(?:[^'\\\n]|\\.)+')"
_NEWLINE = re.compile(rb"\r\n|\r|\n")
_JSON_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(BlockCodec):
    """A list of calls with named arguments. Declared behaviour, beside that of ``BlockCodec``:

    - the list begins a line with ``[name(`` and ends one; anything else (a link, an index) is prose;
    - arguments are named and literal; ``true``, ``false`` and ``null`` are read as JSON has them; a name that is no
      Python identifier is written as ``**{"the name": value}``, a tool of such a name as ``"the name"(…)``;
    - names are compared as written: Python would fold look-alike letters into one another;
    - positional arguments, expressions, tuples, sets, bytes, complex and infinite numbers, repeated arguments, lone
      surrogates: malformed. The calls of one list stand and fall together;
    - a list that never closes is malformed to the end of the turn.
    """

    name: ClassVar[str] = "pythonic"
    opening = re.compile(rf"^[ \t]*\[[ \t\n]*{_NAME}[ \t]*\(")

    def render(self, *calls: ToolCall, tools: Sequence[ToolSchema] = ()) -> str:
        """One list; values as Python writes them."""
        return f"[{', '.join(_render(call) for call in calls)}]" if calls else ""

    def read(self, text: str, start: int, tools: Sequence[ToolSchema]) -> Found | None:
        """Read the list that opens at ``start``."""
        begin = text.index("[", start)
        end = _extent(text, begin, begin + self.max_chars)
        if end is None:
            long = len(text) - begin > self.max_chars
            why = f"longer than {self.max_chars} characters" if long else "the list of calls never closes"
            return Found(begin, len(text), reason=why)
        if text[end:].partition("\n")[0].strip():
            return None
        try:
            return Found(begin, end, self._calls(text[begin:end]))
        except (ValueError, RecursionError, MemoryError) as exc:
            reason = str(exc) if isinstance(exc, ValueError) else "nested too deeply"
            return Found(begin, end, reason=reason)

    def _calls(self, source: str) -> tuple[ToolCall, ...]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # An odd escape in a student's string is no business of the user's.
                tree = ast.parse(source, mode="eval").body
        except (SyntaxError, UnicodeEncodeError) as exc:
            raise ValueError(f"invalid syntax: {getattr(exc, 'msg', exc)}") from None
        if not isinstance(tree, ast.List):
            raise ValueError("expected a list of calls")
        lines = _NEWLINE.split(source.encode())
        return tuple(self._call(node, lines) for node in tree.elts)

    def _call(self, node: ast.expr, lines: list[bytes]) -> ToolCall:
        if not isinstance(node, ast.Call):
            raise ValueError("every item of the list must be a call")
        name = _dotted(node.func, lines)
        if node.args:
            raise ValueError(f"{name}: arguments must be named")
        arguments: dict[str, Any] = {}
        for pair in node.keywords:
            given = _literal(pair.value)
            if pair.arg is not None:
                _as_written(pair.arg, pair, lines)
                given = {pair.arg: given}
            if not isinstance(given, dict):
                raise ValueError(f"{name}: ** needs a dictionary")
            if twice := [key for key in given if key in arguments]:
                raise ValueError(f"{name}: duplicate argument {twice[0]!r}")
            arguments |= given
        check_plain([name, arguments], self.max_depth + 1)
        return ToolCall(name=name, arguments=arguments)


def _extent(text: str, begin: int, limit: int) -> int | None:
    """Where the bracket that opens at ``begin`` closes; strings are skipped whole. None if it does not."""
    depth = 0
    for piece in _PIECE.finditer(text, begin, min(len(text), limit)):
        if piece[0] in "\"'":
            return None  # A string that does not end.
        depth += _BRACKETS.get(piece[0], 0)
        if depth == 0:
            return piece.end()
    return None


def _dotted(node: ast.expr, lines: list[bytes]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        return node.value
    parts: list[str] = []
    inner = node
    while isinstance(inner, ast.Attribute):
        parts.insert(0, inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name):
        raise ValueError("a tool must be called by its name")
    name = ".".join([inner.id, *parts])
    _as_written(name, node, lines)
    return name


def _as_written(name: str, node: Any, lines: list[bytes]) -> None:
    written = b"".join(lines[node.lineno - 1 : node.lineno])[node.col_offset :]
    if not written.startswith(name.encode()):
        raise ValueError(f"the name {name!r} is not written in plain letters")


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or type(node.value) in (bool, int, float, str)):
        if isinstance(node.value, float) and math.isinf(node.value):
            raise ValueError("a number is too large")
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if type(value) in (int, float):
            return -value
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if any(not isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
            raise ValueError("the keys of a dictionary must be strings, each given once")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError(f"an argument must be a literal, not {type(node).__name__.lower()}")


def _render(call: ToolCall) -> str:
    name = call.name if all(map(_plain, call.name.split("."))) else repr(call.name)
    named = [f"{key}={_repr(value)}" for key, value in call.arguments.items() if _plain(key)]
    odd = {key: value for key, value in call.arguments.items() if not _plain(key)}
    return f"{name}({', '.join([*named, f'**{_repr(odd)}'] if odd else named)})"


def _plain(name: str) -> bool:
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _repr(value: Any) -> str:
    text = repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{text} cannot be written in a tool call")
    return text
