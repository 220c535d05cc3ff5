"""The command verifier: an exit code decides, and everybody is told how little that means."""

import pytest

from agentopd.errors import SandboxError
from agentopd.types import VerdictStatus
from agentopd_sandboxes.unsafe import UnsafeSandbox
from agentopd_verifiers.command import CommandVerifier

CHECK = """
import sys
from solution import f
sys.exit(0 if f(2) == int(sys.argv[1]) else 3)
"""


@pytest.fixture
def task(make_task):
    def build(**hidden):
        base = {"trust": "low", "command": ["check.py", "4"], "target": "solution.py", "files": {"check.py": CHECK}}
        return make_task({**base, **hidden}, {"files": {"lib.py": "two = 2\n"}})

    return build


@pytest.fixture
def verdict(task, make_episode, judge):
    def of(program, sandbox=None, submitted=True, **hidden):
        episode = make_episode(final_state={"program": program, "submitted": submitted})
        return judge(CommandVerifier(), task(**hidden), episode, sandbox or UnsafeSandbox(workers=1))

    return of


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("from lib import two\ndef f(x): return two * x", 1.0, "exit code 0"),
        ("def f(x): return x", 0.0, "exit code 3"),
        ("def f(x): return nothing", 0.0, "exit code 1"),
        ("import os\nos._exit(0)", 1.0, "exit code 0"),  # what low trust means
    ],
)
def test_the_exit_code_decides_and_the_verdict_says_so(verdict, program, outcome, detail):
    found = verdict(program)
    assert (found.outcome, found.detail) == (outcome, detail)
    assert found.status is (VerdictStatus.OK if outcome else VerdictStatus.WRONG)
    assert found.provenance["trust"] == "low" and [flag.code for flag in found.flags] == ["low_trust"]


def test_a_task_has_to_accept_low_trust(verdict):
    for trust in ("high", None):
        found = verdict("def f(x): return 4", trust=trust)
        assert found.status is VerdictStatus.TASK_ERROR and "hidden.trust = 'low'" in found.detail


@pytest.mark.parametrize("change", [{"command": []}, {"command": ["other.py"]}, {"target": "check.py"}])
def test_a_broken_task_is_no_verdict(verdict, change):
    assert verdict("def f(x): return 4", **change).status is VerdictStatus.TASK_ERROR


def test_nothing_handed_in_is_no_answer(verdict):
    assert verdict("", submitted=False).status is VerdictStatus.NO_ANSWER


def test_a_sandbox_that_fails_is_not_the_students_fault(verdict):
    class Broken(UnsafeSandbox):
        async def run_cases(self, program, cases, limits=None):
            raise OSError("no space left on device")

    with pytest.raises(SandboxError, match="no space left"):
        verdict("def f(x): return 4", Broken(workers=1))
