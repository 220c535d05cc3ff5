"""Worked arithmetic, re-computed: lines such as ``12+5=17``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_STEP = re.compile(r"\s*([\d\s.+\-*/()]{1,80})=\s*(-?\d{1,18}(?:\.\d{1,9})?)\s*\.?\s*")
_ANSWER = re.compile(r"\s*\\boxed\{\s*(-?[\d.]+)\s*\}\s*\.?\s*")
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class Steps:
    """How many worked lines hold. ``complete``: all lines do, and the last leads to the boxed answer below it."""

    right: int
    wrong: int
    complete: bool


def check_steps(text: str) -> Steps:
    """Re-compute every line that is an equation between plain numbers; other lines are not judged."""
    lines = [line for line in text.splitlines() if line.strip()]
    values: list[str | None] = []
    right = wrong = 0
    for line in lines:
        match = _STEP.fullmatch(line)
        found = evaluate(match[1]) if match else None
        holds = match is not None and found is not None and found == Fraction(match[2])
        right += holds
        wrong += found is not None and not holds
        values.append(match[2] if match and holds else None)
    answer = _ANSWER.fullmatch(lines[-1]) if lines else None
    complete = right > 0 and right == len(lines) - 1 and answer is not None and values[-2] == answer[1]
    return Steps(right, wrong, complete)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of sums, differences, products and quotients of numbers; None for anything else."""
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(type(node).__name__)
