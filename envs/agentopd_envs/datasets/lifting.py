"""Turn test code into cases whose expected values never enter the sandbox.

A test such as ::

    graph = {("a", "b"): 3}
    expected = {"a": 0, "b": 3}
    assert paths("a", graph) == expected

becomes one case per assert: the statements before it are the setup, the side that calls the program is the expression,
the other side is evaluated here, by a small evaluator that knows literals, arithmetic and a few pure functions and
never runs foreign code. Literals that only serve an expected value are left out of the setup. Forms:

- ``assert X == E``, ``assert X is E``: the value of X, compared to E;
- ``assert abs(X - E) < t``: the value of X, within t of E;
- ``assert X``, ``assert not X`` and any other test that calls the program: its truth, as a plain bool;
- ``for v in range(...)`` and other loops over known values are unrolled, ``v`` written out.

A test in any other form is a ``TaskError`` that shows it: a benchmark is never silently shortened.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopd.errors import TaskError
from agentopd.types import JSON
from agentopd_envs.datasets.evaluate import NotConstant, evaluate
from agentopd_verifiers.plain import encode_plain


@dataclass(frozen=True)
class _Scope:
    """Statements so far, and the names among them whose values are known."""

    setup: tuple[ast.stmt, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, name: str, value: Any, statement: ast.stmt) -> _Scope:
        return _Scope((*self.setup, statement), {**self.known, name: value})

    def run(self, statement: ast.stmt) -> _Scope:
        """After a statement of unknown effect: what it binds is no longer known, nor what it may have changed."""
        bound, read = _binds(statement), _reads(statement)
        lost = bound | {name for name in read & self.known.keys() if not _is_immutable(self.known[name])}
        return _Scope((*self.setup, statement), {k: v for k, v in self.known.items() if k not in lost})


def lift(test: str, entry_point: str, prefix: str = "test") -> list[JSON]:
    """The cases of a test: plain statements, or a function ``check(candidate)`` that is called on ``entry_point``.

    Raises ``TaskError`` where an assert cannot be lifted.
    """
    lifter = _Lifter(prefix)
    try:
        lifter.walk(_body(ast.parse(test), entry_point), _Scope())
    except (NotConstant, SyntaxError) as exc:
        raise TaskError(f"test of {entry_point!r} cannot be lifted into cases: {exc}") from exc
    return lifter.cases


def _body(module: ast.Module, entry_point: str) -> list[ast.stmt]:
    """The statements to walk; those of ``check`` follow what precedes it, its parameter bound to the program."""
    for index, statement in enumerate(module.body):
        if isinstance(statement, ast.FunctionDef) and statement.name == "check":
            parameter = statement.args.args[0].arg
            alias = [] if parameter == entry_point else ast.parse(f"{parameter} = {entry_point}").body
            return [*module.body[:index], *alias, *statement.body]
    return module.body


class _Lifter:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.cases: list[JSON] = []

    def walk(self, statements: Sequence[ast.stmt], scope: _Scope) -> _Scope:
        for statement in statements:
            scope = self._statement(statement, scope)
        return scope

    def _statement(self, statement: ast.stmt, scope: _Scope) -> _Scope:
        match statement:
            case ast.Assert(test=test):
                self._assert(test, scope)
                return scope
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                return scope
            case ast.For(target=ast.Name(id=name), iter=source, body=body, orelse=[]) if _asserts(statement):
                for value in evaluate(source, scope.known):
                    bound = ast.parse(f"{name} = {value!r}").body[0]
                    scope = self.walk(body, scope.bind(name, value, bound))
                return scope
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    constant = evaluate(value, scope.known)
                except NotConstant:
                    return scope.run(statement)
                # A list made of a known list may share its parts: what happens to one would happen to the other.
                if _reads(value) and not _is_immutable(constant):
                    return scope.run(statement)
                return scope.bind(name, constant, statement)
        if _asserts(statement):
            raise NotConstant(f"an assert inside {ast.unparse(statement).splitlines()[0]!r}")
        return scope.run(statement)

    def _assert(self, test: ast.expr, scope: _Scope) -> None:
        try:
            evaluate(test, scope.known)
            return  # ``assert True``: says nothing of the program.
        except NotConstant:
            pass
        subject, verdict = _subject(test, scope.known)
        subject = _WriteOut(subject, scope.known).visit(copy.deepcopy(subject))  # loops lift one node many times
        self.cases.append(
            {
                "id": f"{self.prefix}{len(self.cases)}",
                "expression": ast.unparse(subject),
                "setup": "\n".join(ast.unparse(statement) for statement in _needed(subject, scope)),
                **verdict,
            }
        )


def _subject(test: ast.expr, known: Mapping[str, Any]) -> tuple[ast.expr, JSON]:
    """The expression that calls the program, and what its value must be."""
    match test:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            for subject, other in ((left, right), (right, left)):
                try:
                    return subject, {"expected": encode_plain(evaluate(other, known)), "compare": "eq"}
                except NotConstant:
                    continue
            raise NotConstant(f"both sides of {ast.unparse(test)!r} depend on the program or on unknown code")
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="abs"), args=[ast.BinOp(left=subject, op=ast.Sub(), right=other)]),
            ops=[ast.Lt() | ast.LtE()],
            comparators=[bound],
        ):
            expected, tolerance = evaluate(other, known), evaluate(bound, known)
            return subject, {"expected": encode_plain(expected), "compare": "approx", "tolerance": float(tolerance)}
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _truth(operand), {"expected": False, "compare": "eq"}
    return _truth(test), {"expected": True, "compare": "eq"}


class _WriteOut(ast.NodeTransformer):
    """Known immutable values in place of their names, except names that the expression binds itself."""

    def __init__(self, subject: ast.expr, known: Mapping[str, Any]) -> None:
        bound = _binds(subject) | {node.arg for node in ast.walk(subject) if isinstance(node, ast.arg)}
        self.values = {name: value for name, value in known.items() if name not in bound and _is_immutable(value)}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.values:
            return node
        return ast.parse(repr(self.values[node.id]), mode="eval").body


def _is_immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_immutable(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _truth(test: ast.expr) -> ast.expr:
    """``not not test``: a bool whatever the program has made of the name ``bool``."""
    return ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), test))


def _needed(subject: ast.expr, scope: _Scope) -> list[ast.stmt]:
    """The setup without assignments of known values that neither the subject nor another statement reads."""
    kept = list(scope.setup)
    while True:
        read = _reads(subject).union(*(_reads(statement) for statement in kept))
        left = [statement for statement in kept if not _known_assign(statement, scope) or _binds(statement) & read]
        if len(left) == len(kept):
            return kept
        kept = left


def _known_assign(statement: ast.stmt, scope: _Scope) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in scope.known
    return False


def _reads(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Load)}


def _binds(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}


def _asserts(node: ast.AST) -> bool:
    return any(isinstance(item, ast.Assert) for item in ast.walk(node))
