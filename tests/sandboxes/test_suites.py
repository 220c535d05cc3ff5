"""pytest suites in the jail: pristine files, the judge's configuration, exact ids, canaries."""

import asyncio
from collections.abc import Sequence

import pytest

from agentopd.contracts import CaseStatus, SandboxLimits
from agentopd.errors import SandboxError, TaskError, UserError
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.suites import LIBRARIES, SuiteOutcome, TestSuite, run_suite

pytestmark = [pytest.mark.usefixtures("jail_works"), pytest.mark.slow]

TESTS = """
import pytest
from lib import add

def test_small(): assert add(1, 2) == 3

@pytest.mark.parametrize("n", [5, 7])
def test_many(n): assert add(n, n) == 2 * n

class TestKinds:
    def test_refuses(self):
        with pytest.raises(TypeError):
            add(1, "x")
"""
NODES = ["test_lib.py::test_small", "test_lib.py::test_many[5]", "test_lib.py::test_many[7]"]
NODES += ["test_lib.py::TestKinds::test_refuses"]
BUGGY, GOLD = "def add(a, b): return a - b\n", "def add(a, b): return a + b\n"
SUITE = TestSuite({"lib.py": BUGGY, "test_lib.py": TESTS}, NODES, frozenset({"lib.py"}))

ATTACKS = {
    "a conftest with a report hook": {
        "lib.py": BUGGY,
        "conftest.py": "def pytest_runtest_makereport(item, call): raise SystemExit(0)",
    },
    "weaker tests": {"lib.py": BUGGY, "test_lib.py": "def test_small(): pass"},
    "pytest.ini": {"lib.py": BUGGY, "pytest.ini": "[pytest]\naddopts = --collect-only"},
    "a pytest of its own": {"lib.py": BUGGY, "pytest.py": "print('2 passed')"},
    "exit at import": {"lib.py": "import os; os._exit(0)"},
    "skip at import": {"lib.py": "import pytest; pytest.skip('x', allow_module_level=True)"},
    "a syntax error": {"lib.py": "def add(a, b: return"},
    "objects equal to everything": {
        "lib.py": "class A:\n    def __eq__(self, o): return True\n"
        "def add(a, b):\n    if b == 'x': raise TypeError\n    return A()",
    },
    "patch the runner": {
        "lib.py": "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n" + BUGGY,
    },
}


def run(
    *submissions: dict[str, str], suite: TestSuite = SUITE, libraries: Sequence[str] = LIBRARIES
) -> list[SuiteOutcome]:
    async def scenario() -> list[SuiteOutcome]:
        sandbox = JailSandbox(workers=2, libraries=libraries)
        try:
            return [await run_suite(sandbox, suite, files, SandboxLimits(wall_s=20)) for files in submissions]
        finally:
            await sandbox.aclose()

    return asyncio.run(scenario())


def test_gold_passes_and_the_starter_does_not() -> None:
    gold, starter, nothing = run({"lib.py": GOLD}, {"lib.py": BUGGY}, {})
    assert gold.passed == dict.fromkeys(NODES, True) and not gold.tampered and gold.trust == "medium"
    assert list(starter.passed.values()) == [False, False, False, True] == list(nothing.passed.values())


def test_no_attack_passes_every_test_unnoticed() -> None:
    for name, outcome in zip(ATTACKS, run(*ATTACKS.values()), strict=True):
        assert not all(outcome.passed.values()) or outcome.tampered, (name, outcome)
        assert outcome.foreign == tuple(sorted(set(ATTACKS[name]) - {"lib.py"}))


EQUAL = "class A:\n    def __eq__(self, o): return {}\ndef add(a, b): return A()\n"


@pytest.mark.parametrize(
    ("test", "submitted"),
    [
        ("assert 3 == add(1, 2)", EQUAL.format(True)),
        ("assert add([1], [2]) == [1, 2]", EQUAL.format("type(o) is list")),
        ("assert add(1, 2) == {'sum': 3}", EQUAL.format("type(o) is dict")),
        ("assert add(1, 2) == 3", EQUAL.format("type(o) is int")),
    ],
)
def test_what_equals_everything_of_a_kind_is_tampered_with(test: str, submitted: str) -> None:
    file = f"from lib import add\n\ndef test_x():\n    {test}\n"
    suite = TestSuite({"lib.py": BUGGY, "test_lib.py": file}, ["test_lib.py::test_x"], frozenset({"lib.py"}))
    (outcome,) = run({"lib.py": submitted}, suite=suite)
    assert outcome.passed == {"test_lib.py::test_x": True} and outcome.tampered


def test_tests_that_may_end_before_they_compare_make_no_honest_program_tampered() -> None:
    bodies = ["for x in ():\n        assert x == 1", "return\n    assert add(1, 2) == 3", "assert add(1, 2) == 3"]
    file = "from lib import add\n" + "".join(f"\ndef test_{i}():\n    {body}\n" for i, body in enumerate(bodies))
    nodes = [f"test_lib.py::test_{index}" for index in range(len(bodies))]
    (outcome,) = run({"lib.py": GOLD}, suite=TestSuite({"lib.py": GOLD, "test_lib.py": file}, nodes, SUITE.editable))
    assert outcome.passed == dict.fromkeys(nodes, True) and not outcome.tampered


BREAK_PYTEST = """
import _pytest.config
def unavailable(self): raise ModuleNotFoundError("No module named 'pytest'")
_pytest.config.Config._ensure_unconfigure = unavailable
"""


def test_a_sandbox_without_pytest_gives_no_score_and_a_program_that_breaks_pytest_gets_one() -> None:
    with pytest.raises(SandboxError, match=r"'jail' cannot run tests for pytest.*pytest.*LIBRARIES"):
        run({"lib.py": GOLD}, libraries=())
    (broken,) = run({"lib.py": BREAK_PYTEST + GOLD})
    assert set(broken.statuses.values()) == {CaseStatus.EXCEPTION}
    assert not any(broken.passed.values()) and not broken.tampered


def test_suites_are_checked() -> None:
    async def attempt(suite: TestSuite) -> None:
        await run_suite(JailSandbox(workers=1), suite, {})

    for suite in (
        TestSuite({}, ["x.py::test"], frozenset()),
        TestSuite({"x.py": ""}, ["x.py::test"], frozenset({"x.py"})),
        TestSuite({"x.py": ""}, ["x.py::test", "x.py::test"], frozenset()),
    ):
        with pytest.raises(TaskError, match=r"test"):
            asyncio.run(attempt(suite))
    with pytest.raises(UserError, match="not installed here"):
        JailSandbox(libraries=("no_such_library",))
