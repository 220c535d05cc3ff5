"""The shipped suite, run against the jail; Docker has its own file."""

import asyncio
import re
from pathlib import Path

import pytest

from agentopd.testing import CATALOGUE, HONEST, HOSTILE, SUBMISSIONS, Row, check_sandbox
from agentopd.testing.suite import Finding, expectation
from agentopd_sandboxes import JailSandbox

pytestmark = pytest.mark.usefixtures("jail_works")


def check(rows: list[Row]) -> list[Finding]:
    async def scenario() -> list[Finding]:
        sandbox = JailSandbox(workers=2)
        try:
            return await check_sandbox(sandbox, rows)
        finally:
            await sandbox.aclose()

    return asyncio.run(scenario())


def test_the_catalogue_is_complete() -> None:
    numbers = [int(row.id[1:]) for row in HOSTILE if row.id[0] in "ABCDEF"]
    assert numbers == list(range(1, 65)) and len(HONEST) == 12
    assert len({row.id for row in CATALOGUE}) == len(CATALOGUE) >= 64 + 12


def test_a_sample_of_the_suite_passes_on_the_jail() -> None:
    findings = check([row for row in CATALOGUE if row.id in ("A2", "B11", "C28", "E52", "F62", "H10")])
    assert [finding for finding in findings if not finding.ok] == []
    assert [finding.outcome for finding in findings] == [0, 0, 0, 0, 0, 1, None]


@pytest.mark.slow
def test_the_whole_suite_passes_on_the_jail() -> None:
    assert [finding for finding in check(CATALOGUE) if not finding.ok] == []


def test_the_security_page_prints_the_catalogue() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text()
    matrix = page.partition("<!-- matrix:start -->")[2].partition("<!-- matrix:end -->")[0]
    printed = [tuple(cell.strip() for cell in line.strip("|").split("|"))[:3] for line in matrix.splitlines()]
    assert [row for row in printed if row and re.match(r"[A-Z]\d", row[0])] == [
        *((row.id, row.title, expectation(row)) for row in CATALOGUE),
        *((row.id, row.title, row.expected) for row in SUBMISSIONS),
    ]
