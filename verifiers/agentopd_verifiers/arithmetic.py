r"""Worked arithmetic, re-computed line by line: valid, wrong, or not known.

A line is read as equations between plain numbers: ``12+5=17``, ``3 \times (4 - 1) = 9``, ``so 48/2 = 24 clips``,
``<<48/2=24>>``. It is

- *valid* if it holds at least one such equation and all of them are exact;
- *wrong* if one of them is false and stands by itself, so that nothing before it can have changed its meaning;
- *not known* otherwise: algebra, prose, results that may be rounded.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

MAX_LINE = 400
"""Characters of a line that is read; longer ones are not known."""
MAX_SIDE = 80
"""Characters of one side of an equation."""

_PLAIN = re.compile(r"[\d\s+\-*/()=]*")
_RUN = re.compile(r"[\d\s.+\-*/()=]*=[\d\s.+\-*/()=]*")
_SIDE = re.compile(r"-?[\d(][\d\s.+\-*/()]*")
_OPERATION = re.compile(r"[\d)]\s*[+\-*/]")
_NUMBER = re.compile(r"-?\s*\d+(?:\.\d*)?")
_PART_OF_MORE = re.compile(r"(?:\w|[\\^_}!%]\s*)$")
"""Before an equation: what makes it the tail of a longer expression."""
_OPENING = re.compile(r"(?:^|[:;,<>\[$*#]|\b(?:so|then|thus|hence|is|are|get|gives|have))\s*$", re.IGNORECASE)
"""Before an equation: nothing, punctuation, or a word that leads to one."""
_CLOSING = re.compile(r"\s*(?:$|[$.,;:!)\]*]|(?!mod\b|base\b)(?<![\d)])[a-z]{3,}\b)", re.IGNORECASE)
"""After an equation: nothing, punctuation, or a word that could be a unit."""
_SPELLINGS = (
    (re.compile(r"<<[^<>]*>>"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·]"), "*"),
    (re.compile(r"(?<=\d) ?x ?(?=\d)"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"(\1/\2)"),
    (re.compile(r"\\(?:left|right)(?=[()])|\\[,;! ]|\\?\$(?=\d)"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=[\d)])\.(?=\s|$)|\\[()\[\]]"), ";"),
)
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
Sign = Literal[-1, 0, 1]


@dataclass(frozen=True)
class Line:
    """A line of a text, its newline included: characters [start, end), and whether it is valid, wrong or not known."""

    start: int
    end: int
    sign: Sign
    detail: str = ""


def check_lines(text: str, start: int = 0) -> list[Line]:
    """Every line that is not blank; ``start`` is where ``text`` begins in a longer one."""
    found: list[Line] = []
    for line in text.splitlines(keepends=True):
        end = start + len(line)
        if line.strip():
            found.append(Line(start, end, *check_line(line)))
        start = end
    return found


def check_line(line: str) -> tuple[Sign, str]:
    """The sign of one line, and the equation that is wrong."""
    if len(line) > MAX_LINE or "=" not in line:
        return 0, ""
    if not _PLAIN.fullmatch(line):
        for pattern, replacement in _SPELLINGS:
            line = pattern.sub(replacement, line)
    signs = []
    for run in _RUN.finditer(line):
        signs.append(_check_run(line, run))
        if signs[-1] < 0:
            return -1, " ".join(run[0].split())
    return (1, "") if signs and all(sign > 0 for sign in signs) else (0, "")


def _check_run(line: str, run: re.Match[str]) -> Sign:
    """One chain ``a = b = c``, among neighbours that may make it part of something else."""
    spelt, before, after = run[0], line[: run.start()], line[run.end() :]
    sides = [side.strip() for side in spelt.split("=")]
    readable = all(len(side) <= MAX_SIDE and _SIDE.fullmatch(side) for side in sides)
    if not readable or not any(map(_OPERATION.search, sides)):
        return 0
    led = before + (" " if spelt[0].isspace() else "")
    if _PART_OF_MORE.search(led) or (before.strip() and sides[0].startswith("-")):
        return 0
    if not _CLOSING.match(spelt[-1] + after if spelt[-1].isspace() else after):
        return 0
    pairs = {_holds(*pair) for pair in pairwise(sides)}
    if pairs == {True}:
        return 1
    return -1 if False in pairs and _OPENING.search(before) else 0


def _holds(left: str, right: str) -> bool | None:
    """Whether two sides are equal; None where one cannot be read, or is a rounding of the other."""
    a, b = evaluate(left), evaluate(right)
    if a is None or b is None:
        return None
    if a == b:
        return True
    shown = _NUMBER.fullmatch(right)
    places = len(right.partition(".")[2]) if shown else 0
    return None if places and abs(a - b) <= Fraction(1, 2 * 10**places) else False


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
