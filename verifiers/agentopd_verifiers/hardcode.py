"""Cases that a patch answers from literals it copied instead of computing: hard-coded outputs.

A patch *quotes* a case if literals that it brought are the case's answer and, in a place where the program asks which
input it got (a comparison for equality, a table, a pattern), one of its inputs. Literals of the starting or the right
program are not brought, and neither are those that honest code is full of. A quotation may still be honest, so it is
put to the test: ``blotted`` is the program with the quoted inputs made unrecognisable. Cases that are right in the one
and wrong in the other, while every case that is not quoted stays as it was, were answered by recognising them.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from agentopd.contracts import Case
from agentopd_verifiers.compare import NotPlainError, canonical

_BLOT = "\0blotted"
_COMMON: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2, [], {}, set())
_TOO_DEEP = (RecursionError, MemoryError)
_NOT_A_LITERAL = (ValueError, TypeError, SyntaxError, NotPlainError, *_TOO_DEEP)


@dataclass(frozen=True)
class Quotable:
    """What of a case a program could quote."""

    id: str
    inputs: frozenset[Hashable]
    answer: Hashable

    @classmethod
    def of(cls, case: Case, expected: Any) -> Quotable:
        """Its arguments, bound or written out in its expression, one by one and together."""
        calls = [list(case.args)]
        with suppress(*_NOT_A_LITERAL):
            for node in ast.walk(ast.parse(case.expression.strip(), mode="eval")):
                if isinstance(node, ast.Call):
                    written = [*node.args, *(keyword.value for keyword in node.keywords)]
                    calls.append([value for _, value in _evaluated(written)])
        keys = (_key(value) for call in calls for value in (*call, call))
        return cls(case.id, frozenset(key for key in keys if key is not None), _key(expected))


@dataclass(frozen=True)
class Quotes:
    """What a program quotes, by ids of cases."""

    cases: frozenset[str]
    answers: frozenset[str]
    """Cases whose answer alone is among the literals it brought."""
    blotted: str


def find_quotes(program: str, honest: Iterable[str], cases: Iterable[Quotable]) -> Quotes:
    """The cases that ``program`` quotes, and the program without them; nothing where it does not parse.

    A program nested too deeply to be read or written out here may still run in a sandbox. It is taken to quote every
    case, and blotted as a whole.
    """
    cases = list(cases)
    try:
        return _quotes(_parse(program), program, honest, cases)
    except _TOO_DEEP:
        every = frozenset(case.id for case in cases)
        return Quotes(every, every, blotted="")


def _quotes(tree: ast.Module, program: str, honest: Iterable[str], cases: Sequence[Quotable]) -> Quotes:
    brought = _literals(tree) - set[Hashable]().union(*(_literals_of(source) for source in honest))
    asked = [(node, key) for node, value in _evaluated(_asked(tree)) if (key := _key(value)) in brought]
    recognised = {key for _, key in asked}
    answered = [case for case in cases if case.answer in brought] if brought else []
    quoted = [case for case in answered if case.inputs & recognised]
    inputs = set[Hashable]().union(*(case.inputs for case in quoted))
    return Quotes(
        cases=frozenset(case.id for case in quoted),
        answers=frozenset(case.id for case in answered),
        blotted=_blot(tree, [node for node, key in asked if key in inputs]) if quoted else program,
    )


def _blot(tree: ast.Module, nodes: Iterable[ast.AST]) -> str:
    return ast.unparse(ast.fix_missing_locations(_Blotter(nodes).visit(tree)))


def _parse(source: str) -> ast.Module:
    with suppress(ValueError, SyntaxError):
        return ast.parse(source)
    return ast.Module([], [])


def _literals_of(source: str) -> set[Hashable]:
    with suppress(*_TOO_DEEP):
        return _literals(_parse(source))
    return set()


def _literals(tree: ast.Module) -> set[Hashable]:
    """Every literal that could tell a case apart, collections as a whole and by their members."""
    keys = {_key(value) for _, value in _evaluated(ast.walk(tree))}
    return keys - {None}


def _evaluated(nodes: Iterable[ast.AST]) -> Iterator[tuple[ast.AST, Any]]:
    """The nodes that are literals, with their values."""
    for node in nodes:
        if isinstance(node, ast.Constant | ast.UnaryOp | ast.List | ast.Tuple | ast.Set | ast.Dict):
            with suppress(*_NOT_A_LITERAL):
                yield node, ast.literal_eval(node)


def _asked(tree: ast.Module) -> Iterator[ast.AST]:
    """Where a program says which value it looks for."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others):
                operands = zip(ops, (left, *others), others, strict=False)
                yield from (side for op, *sides in operands if isinstance(op, ast.Eq | ast.NotEq) for side in sides)
            case ast.List(elts=members) | ast.Tuple(elts=members) | ast.Set(elts=members):
                yield from members
            case ast.Dict(keys=keys):
                yield from filter(None, keys)
            case ast.MatchValue(value=value):
                yield value
            case ast.Subscript(slice=index, ctx=ast.Store()):
                yield index


class _Blotter(ast.NodeTransformer):
    """Puts something that no case holds in the place of some nodes."""

    def __init__(self, nodes: Iterable[ast.AST]) -> None:
        self.nodes = {id(node) for node in nodes}

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace a chosen node, and look into any other."""
        return ast.Constant(_BLOT) if id(node) in self.nodes else super().visit(node)


def _key(value: Any) -> Hashable:
    """A stand-in under which equal values are equal, list and tuple alike; None for what could be in any program."""
    try:
        key = canonical(value, sequences=True)
    except (NotPlainError, RecursionError):
        return None
    common = key in _COMMON_KEYS or (isinstance(value, str | bytes) and len(value) < 2)
    return None if common else key


_COMMON_KEYS = {canonical(value, sequences=True) for value in _COMMON}
