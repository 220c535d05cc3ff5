"""Cases as tasks carry them, in the three forms others need: for the sandbox, for the student, and judged."""

from __future__ import annotations

from typing import Any

from agentopd.contracts import Case, CaseResult, CaseStatus
from agentopd.types import JSON
from agentopd_verifiers.compare import matches
from agentopd_verifiers.plain import decode_plain


def to_case(case: JSON) -> Case:
    """What the sandbox runs: everything but the expected value."""
    return Case(case["id"], case["expression"], case.get("setup", ""), _arguments(case))


def call_text(case: JSON) -> str:
    """The case as a reader would write it: bound arguments in place, setup first."""
    call = case["expression"].replace("*args", ", ".join(map(_show, _arguments(case))))
    return f"{case['setup']}\n{call}" if case.get("setup") else call


def call_length(case: JSON) -> int:
    """Characters of ``call_text``: how much of a prompt the case takes."""
    return len(call_text(case))


def expectation(case: JSON) -> str:
    """``f(3, 4) gives 12``, with the right value."""
    return f"{call_text(case)} gives {_show(decode_plain(case['expected']))}"


def report(case: JSON, result: CaseResult) -> str:
    """One line for the student: pass, or what came out instead."""
    call, expected = call_text(case), decode_plain(case["expected"])
    wanted = _show(expected)
    if result.status is not CaseStatus.VALUE:
        what = f"{result.status.value}: {result.detail}" if result.detail else result.status.value
        return f"fail: {call} ends in {what}, expected {wanted}"
    if matches(expected, result.value, case.get("compare", "eq"), case.get("tolerance")):
        return f"pass: {call}"
    return f"fail: {call} gives {_show(result.value)}, expected {wanted}"


def _arguments(case: JSON) -> tuple[Any, ...]:
    return tuple(decode_plain(value) for value in case.get("args", ()))


def _show(value: Any) -> str:
    """``repr``, with the members of sets in order: prompts must not depend on the hash seed."""
    kind = type(value)
    if kind in (set, frozenset) and value:
        members = "{" + ", ".join(sorted(map(_show, value))) + "}"
        return members if kind is set else f"frozenset({members})"
    if kind is list:
        return "[" + ", ".join(map(_show, value)) + "]"
    if kind is tuple:
        return "(" + ", ".join(map(_show, value)) + ("," if len(value) == 1 else "") + ")"
    if kind is dict:
        return "{" + ", ".join(f"{_show(key)}: {_show(item)}" for key, item in value.items()) + "}"
    return repr(value)
