"""Test suites written for pytest, run so that neither their files nor their runner belong to the student.

The files are the pristine ones with only the declared editable ones replaced. Every test runs in a process of its own,
under a configuration of the judge's, without conftest files or plugins. It passes only if exactly its own id went
through set-up, call and tear-down; canaries under fresh names, which must fail, run among the tests in random order.
Test and program share a process, so a suite is trusted less than values compared outside (trust ``medium``); an exit
code is trusted by nobody.
"""

from __future__ import annotations

import ast
import random
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, Sandbox, SandboxLimits
from agentopd.errors import SandboxError, TaskError

LIBRARIES = ("iniconfig", "packaging", "pluggy", "py", "pygments", "_pytest", "pytest")
"""What a jail has to be given so that it can run a suite: ``JailSandbox(libraries=LIBRARIES)``."""
CANARIES = 3
_PASSED = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]
_RUNNER = """
import os, sys
import pytest

def run(node):
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    seen = []
    class Watch:
        def pytest_runtest_logreport(self, report):
            seen.append((report.nodeid, report.when, report.outcome))
    os.chdir("project")
    sys.path.insert(0, os.getcwd())
    options = ["-q", "-c", "/work/judge.ini", "--rootdir=.", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider"]
    pytest.main([*options, "-p", "no:faulthandler", "--import-mode=importlib", node], plugins=[Watch()])
    return seen
"""
_CANARY = """
def {name}():
    for twin in ({twins}):
        try:
            twin()
        except BaseException:
            continue
        return
    value = {value}
    assert value == {other}
"""
_DISPLAYS = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict)


@dataclass(frozen=True)
class TestSuite:
    """A repository, the tests that decide (``path::name`` as pytest spells them), and what the student may edit."""

    __test__ = False

    pristine: Mapping[str, str]
    tests: Sequence[str]
    editable: frozenset[str]


@dataclass(frozen=True)
class SuiteOutcome:
    """Which tests pass, by id; ``tampered`` if a canary passed; ``foreign``: files submitted that were not editable."""

    passed: Mapping[str, bool]
    statuses: Mapping[str, CaseStatus]
    tampered: bool
    foreign: tuple[str, ...]
    trust: str = "medium"


async def run_suite(
    sandbox: Sandbox, suite: TestSuite, submitted: Mapping[str, str], limits: SandboxLimits | None = None
) -> SuiteOutcome:
    """Run every test once on the pristine files with the submitted editable ones in place.

    Raises ``TaskError`` for a suite that names a test outside its files, ``SandboxError`` if a test was not answered
    exactly once, or if the sandbox cannot run tests.
    """
    _check(suite)
    foreign = tuple(sorted(set(submitted) - suite.editable))
    files = {**suite.pristine, **{name: text for name, text in submitted.items() if name in suite.editable}}
    canaries, paths = [], list({node.partition("::")[0] for node in suite.tests})
    random.SystemRandom().shuffle(paths)
    for index in range(CANARIES):
        node, source = _canary(suite, paths[index % len(paths)])
        files[node.partition("::")[0]] = source
        canaries.append(node)
    cases = [Case(node, "run(*args)", args=(node,)) for node in (*suite.tests, *canaries)]
    random.SystemRandom().shuffle(cases)
    results = await sandbox.run_cases(_program(files), cases, limits)
    if sorted(result.id for result in results) != sorted(case.id for case in cases):
        raise SandboxError(f"{len(results)} results for the {len(cases)} tests of a suite")
    if all(result.status is CaseStatus.EXCEPTION for result in results):
        await _check_runner(sandbox, limits)
    found = {result.id: result for result in results}
    return SuiteOutcome(
        passed={node: _holds(found[node]) for node in suite.tests},
        statuses={node: found[node].status for node in suite.tests},
        tampered=any(_holds(found[node]) for node in canaries),
        foreign=foreign,
    )


def _program(files: Mapping[str, str]) -> Program:
    return Program(_RUNNER, {"judge.ini": "[pytest]\n", **{f"project/{name}": text for name, text in files.items()}})


async def _check_runner(sandbox: Sandbox, limits: SandboxLimits | None) -> None:
    """Run a test that passes, without a file of the suite or the student; ``SandboxError`` if it does not.

    No word of a run that loaded the student's files counts here: a program could void its own verdict by it.
    """
    node = "test_runner.py::test_runner"
    program = _program({"test_runner.py": "def test_runner():\n    pass\n"})
    (result,) = await sandbox.run_cases(program, [Case(node, "run(*args)", args=(node,))], limits)
    if not _holds(result):
        raise SandboxError(
            f"the sandbox {sandbox.name!r} cannot run tests for pytest: {result.detail or result.status}; "
            "give it the libraries of agentopd_sandboxes.suites.LIBRARIES"
        )


def _check(suite: TestSuite) -> None:
    if not suite.tests or len(set(suite.tests)) != len(suite.tests):
        raise TaskError("a test suite needs tests, each named once")
    for node in suite.tests:
        path = node.partition("::")[0]
        if path not in suite.pristine or path in suite.editable:
            raise TaskError(f"test {node!r}: its file has to be among the pristine ones, and not editable")


def _canary(suite: TestSuite, path: str) -> tuple[str, str]:
    """A copy, under a fresh name, of a file of tests, with one more test that cannot pass; its id and the file.

    The copy imports whatever the tests import, so that code which patches the runner on import patches it here too. The
    test passes if any twin of the file's own tests does: values that are equal to everything make one pass.
    """
    folder, slash, _ = path.rpartition("/")
    name, value = f"test_{secrets.token_hex(6)}", secrets.randbelow(10**9)
    twins = dict(_twins(suite, path))
    listed = "".join(f"{twin}, " for twin in twins)
    canary = _CANARY.format(name=name, twins=listed, value=value, other=value + 1 + secrets.randbelow(10**9))
    source = "\n\n".join([suite.pristine[path], *twins.values(), canary])
    return f"{folder}{slash}test_{secrets.token_hex(6)}.py::{name}", source


def _twins(suite: TestSuite, path: str) -> Iterator[tuple[str, str]]:
    """Tests of a file that compare with another value than they should, under fresh names: (name, source).

    Only tests that run to their end through an ``assert ... == ...`` of their own, so that a twin can pass by nothing
    else: one inside a loop or a branch may never be reached.
    """
    tree = ast.Module([], [])
    with suppress(SyntaxError, ValueError):  # then its tests fail, whatever is handed in
        tree = ast.parse(suite.pristine[path])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_plain(node)]
    for node in functions:
        if f"{path}::{node.name}" in suite.tests and sum(map(_falsify, node.body)):
            node.name = f"_{secrets.token_hex(6)}"
            yield node.name, ast.unparse(node)


def _is_plain(node: ast.FunctionDef) -> bool:
    """Whether it can be called as it is, and ends only at its end or by an exception."""
    leaves = (ast.Return, ast.Yield, ast.YieldFrom)
    return not (
        node.decorator_list or ast.unparse(node.args) or any(isinstance(part, leaves) for part in ast.walk(node))
    )


def _falsify(statement: ast.stmt) -> bool:
    """Put another value in the place of what an ``assert ... == ...`` expects; whether it is one."""
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]) as test):
            if isinstance(left, _DISPLAYS) and not isinstance(right, _DISPLAYS):
                test.left = _other(left)
            else:
                test.comparators = [_other(right)]
            return True
    return False


def _other(value: ast.expr) -> ast.expr:
    """A value that nothing honest is equal to; of the same kind, where the kind can be read."""
    token = ast.Constant(secrets.token_hex(12))
    match value:
        case ast.Constant(value=int() | float()):
            return ast.Constant(secrets.randbits(90))
        case ast.List() | ast.Tuple() | ast.Set():
            value.elts.append(token)
        case ast.Dict():
            value.keys.append(token)
            value.values.append(token)
        case _:
            return token
    return value


def _holds(result: CaseResult) -> bool:
    """Whether exactly this test went through, and nothing else did."""
    expected = [(result.id, when, outcome) for when, outcome in _PASSED]
    return result.status is CaseStatus.VALUE and result.value == expected
