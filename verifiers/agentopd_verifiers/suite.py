"""The suite verifier: a repository with the student's edits, judged by tests written for pytest.

The tests run as ``agentopd_sandboxes.suites`` describes. Test and program share a process, so a verdict carries trust
``medium``; where values can be compared outside the sandbox, the ``code`` verifier is the stronger judge.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from agentopd.contracts import CaseStatus, Sandbox, SandboxLimits
from agentopd.errors import SandboxError, TaskError, boundary
from agentopd.types import Episode, Flag, Task, VerdictStatus
from agentopd_sandboxes.suites import SuiteOutcome, TestSuite, run_suite
from agentopd_verifiers.diff import DEFAULT_BUDGET, gated_reward, patch_penalty
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=20.0)
"""Of one test; importing pytest's plugins and the repository takes part of it."""
CACHED = 512
_STATUS = {
    CaseStatus.TIMEOUT: VerdictStatus.TIMEOUT,
    CaseStatus.RESOURCE: VerdictStatus.RESOURCE,
    CaseStatus.CRASH: VerdictStatus.CRASH,
}


class SuiteVerifier(JudgingVerifier):
    """Outcome 1 if every test passes, the hidden ones and those that were shown; reward by the gated diff penalty.

    ``public``: ``files``, ``editable`` (paths), ``tests`` (ids). ``hidden``: ``files`` (the hidden tests, laid over the
    others), ``tests`` (ids), optional ``gold`` ({path: text}) and ``budget``. ``final_state``: ``files`` (the editable
    ones as they are) and ``submitted``.
    """

    name: ClassVar[str] = "suite"
    version: ClassVar[str] = "1"
    needs_sandbox: ClassVar[bool] = True

    def __init__(self) -> None:
        self._known: OrderedDict[str, SuiteOutcome] = OrderedDict()

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Run the suite on what was handed in, and on the starting files where they are needed to tell progress."""
        suite = suite_of(task)
        if not episode.final_state.get("submitted"):
            return Finding(0.0, VerdictStatus.NO_ANSWER, detail="nothing was submitted")
        if sandbox is None:
            raise SandboxError("the suite verifier needs a sandbox and was given none")
        submitted: Mapping[str, str] = episode.final_state["files"]
        mine = await self._outcome(task, suite, submitted, sandbox)
        passed = all(mine.passed.values()) and not mine.tampered
        before = None if passed else await self._outcome(task, suite, {}, sandbox)
        share = 1.0 if before is None else progress(before.passed, mine.passed)
        penalty, patch = patch_penalty(
            _joined(suite, {}), _joined(suite, submitted), _gold(task, suite), task.hidden.get("budget", DEFAULT_BUDGET)
        )
        flags = [Flag(code="foreign_files", detail=", ".join(mine.foreign[:5]))] if mine.foreign else []
        return Finding(
            float(passed),
            _status(mine, passed),
            reward=0.0 if mine.tampered else gated_reward(passed, share, penalty.total),
            components={
                "pass": float(passed),
                "p": share,
                "cases": float(len(mine.passed)),
                "cases_passed": float(sum(mine.passed.values())),
                "penalty": penalty.total,
                "diff_lines": float(patch.lines),
                "diff_cost": patch.cost,
            },
            flags=[
                *flags,
                *([Flag(code="tampered", detail="a test that cannot pass passed")] if mine.tampered else []),
            ],
            detail="" if passed else f"{sum(mine.passed.values())} of {len(mine.passed)} tests pass",
            evidence={"trust": mine.trust},
        )

    async def _outcome(
        self, task: Task, suite: TestSuite, submitted: Mapping[str, str], sandbox: Sandbox
    ) -> SuiteOutcome:
        """Kept by task and files, so that equal submissions of a group run once."""
        key = hashlib.sha256(json.dumps([task.hash, dict(submitted)], sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            with boundary(SandboxError, f"running the tests of task {task.id}"):
                self._known[key] = await run_suite(sandbox, suite, submitted, LIMITS)
            if len(self._known) > CACHED:
                self._known.popitem(last=False)
        return self._known[key]


def suite_of(task: Task) -> TestSuite:
    """The suite that judges a task: its public files with the hidden ones laid over them, and all tests of both."""
    files = {**task.public["files"], **hidden_field(task, "files", dict)}
    tests = [*hidden_field(task, "tests", list), *task.public.get("tests", ())]
    return TestSuite(files, list(dict.fromkeys(tests)), frozenset(task.public["editable"]))


def progress(before: Mapping[str, bool], after: Mapping[str, bool]) -> float:
    """Tests fixed less tests broken, over the tests that failed; in [0, 1]."""
    failed = [name for name in before if not before[name]]
    fixed = sum(after[name] for name in failed)
    broken = sum(before[name] and not after[name] for name in before)
    return min(1.0, max(0.0, (fixed - broken) / len(failed))) if failed else 0.0


def _joined(suite: TestSuite, changed: Mapping[str, str]) -> str:
    """The editable Python as one text, for its size to be measured."""
    paths: Sequence[str] = sorted(path for path in suite.editable if path.endswith(".py"))
    return "\n".join(changed.get(path, suite.pristine.get(path, "")) for path in paths)


def _gold(task: Task, suite: TestSuite) -> str | None:
    gold = task.hidden.get("gold")
    if gold is None:
        return None
    if not isinstance(gold, dict) or set(gold) - suite.editable:
        raise TaskError("hidden.gold is {path: text} of editable files")
    return _joined(suite, gold)


def _status(mine: SuiteOutcome, passed: bool) -> VerdictStatus:
    if mine.tampered:
        return VerdictStatus.TAMPERED
    if passed:
        return VerdictStatus.OK
    failing = (mine.statuses[name] for name, held in mine.passed.items() if not held)
    return next((_STATUS[status] for status in failing if status in _STATUS), VerdictStatus.WRONG)
