"""Values of constant expressions: literals, arithmetic and a few pure functions, bounded, never ``eval``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_MAX_ITEMS = 10_000


def _times(left: Any, right: Any) -> Any:
    size = max((len(side) for side in (left, right) if hasattr(side, "__len__")), default=0)
    count = min((side for side in (left, right) if isinstance(side, int)), default=0)
    if size * count > _MAX_ITEMS:
        raise ValueError(f"more than {_MAX_ITEMS} items")
    return left * right


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (abs, bool, dict, float, int, len, list, max, min, range, round, set, sorted, str, sum, tuple)
}


class NotConstant(Exception):
    """The expression depends on more than constants and known names."""


def evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of an expression over constants and ``known`` names.

    Raises ``NotConstant`` for anything else, for an expression that raises, and for results of more than 10 000 items.
    """
    try:
        value = _evaluate(node, known)
    except (ArithmeticError, TypeError, ValueError, LookupError) as exc:
        raise NotConstant(f"{ast.unparse(node)}: {exc}") from exc
    if isinstance(value, range | str | list | tuple | dict | set) and len(value) > _MAX_ITEMS:
        raise NotConstant(f"{ast.unparse(node)}: more than {_MAX_ITEMS} items")
    return value


def _evaluate(node: ast.expr, known: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.List(elts=items):
            return [evaluate(item, known) for item in items]
        case ast.Tuple(elts=items):
            return tuple(evaluate(item, known) for item in items)
        case ast.Set(elts=items):
            return {evaluate(item, known) for item in items}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {evaluate(key, known): evaluate(value, known) for key, value in pairs if key is not None}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](evaluate(operand, known))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](evaluate(left, known), evaluate(right, known))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and name not in known:
            return _FUNCTIONS[name](*(evaluate(argument, known) for argument in args))
    raise NotConstant(f"{ast.unparse(node)!r} is not a constant")
