"""The shipped suite of submissions, run against the shipped verifiers and against one that believes everything."""

import asyncio

import pytest

from agentopd.registry import verifiers
from agentopd.testing import SUBMISSIONS, check_verifier
from agentopd.types import Verdict, VerdictStatus


@pytest.mark.slow
@pytest.mark.parametrize("name", ["math", "state", "code"])
def test_the_shipped_verifiers_give_what_is_due(name, process_sandbox):
    findings = asyncio.run(check_verifier(verifiers.get(name)(), process_sandbox))
    assert [finding for finding in findings if not finding.ok] == []
    assert len(findings) == sum(row.verifier == name for row in SUBMISSIONS) >= 12
    assert {finding.outcome for finding in findings} >= {0.0, 1.0}


class Believer:
    name, version = "math", "1"

    async def verify(self, task, episode, sandbox):
        return Verdict(outcome=1.0, status=VerdictStatus.OK, reward=1.0)


def test_a_verifier_that_believes_everything_is_found_out():
    findings = asyncio.run(check_verifier(Believer()))
    assert {finding.ok for finding in findings if finding.expected != "1"} == {False}
    assert {finding.ok for finding in findings if finding.expected == "1"} == {True}
