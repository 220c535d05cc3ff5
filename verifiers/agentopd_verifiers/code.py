"""The code verifier: hidden cases run in a sandbox, their values compared outside it, the patch's size priced.

A program never sees what is expected of it. One ``run_cases`` call judges one program; the outcomes of a (task,
program) pair are kept, so that the starting program, and equal programs of one group, run once.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from agentopd.contracts import Case, CaseResult, CaseStatus, Program, Sandbox, SandboxLimits
from agentopd.errors import SandboxError, TaskError, boundary
from agentopd.types import Episode, Flag, StepCertificate, Task, Verdict, VerdictStatus
from agentopd_verifiers.compare import COMPARATORS, matches
from agentopd_verifiers.diff import DEFAULT_BUDGET, Patch, Penalty, gated_reward, patch_penalty, penalty
from agentopd_verifiers.edits import MAX_EDITS, edit_steps, find_edits
from agentopd_verifiers.files import compare_files
from agentopd_verifiers.hardcode import Quotable, Quotes, find_quotes
from agentopd_verifiers.judge import Finding, JudgingVerifier, PatchError, hidden_field
from agentopd_verifiers.plain import decode_plain
from agentopd_verifiers.steps import certify

CACHED_PROGRAMS = 2048
COST = ("diff_cost", "diff_other")
"""Components that add up to a patch's cost."""
REFERENCE, SIBLING = "diff_reference", "sibling"
_STATUS = {
    CaseStatus.TIMEOUT: VerdictStatus.TIMEOUT,
    CaseStatus.RESOURCE: VerdictStatus.RESOURCE,
    CaseStatus.CRASH: VerdictStatus.CRASH,
}


@dataclass(frozen=True)
class Test:
    """One case with what it must give."""

    case: Case
    expected: Any
    compare: str
    tolerance: float | None
    weight: float

    def holds(self, result: CaseResult) -> bool:
        """Whether a result is a value, and the right one."""
        if result.status is not CaseStatus.VALUE:
            return False
        return matches(self.expected, result.value, self.compare, self.tolerance)


@dataclass(frozen=True)
class Outcomes:
    """Which tests a program passes (by id), how each case ended, and whether it answered a call that cannot succeed."""

    passed: Mapping[str, bool]
    statuses: Mapping[str, CaseStatus]
    tampered: bool = False


class CodeVerifier(JudgingVerifier):
    """Outcome 1 if every hidden and public case passes; reward by ``agentopd_verifiers.diff``."""

    name: ClassVar[str] = "code"
    version: ClassVar[str] = "2"
    needs_sandbox: ClassVar[bool] = True
    priced: ClassVar[bool] = True
    """Whether a large patch costs reward."""

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self._limits = limits
        self._known: OrderedDict[str, Outcomes] = OrderedDict()
        self._running: dict[str, asyncio.Future[Outcomes]] = {}

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Run the submitted program's cases, and those of the programs before it where they are needed."""
        tests = _tests(task)
        try:
            program = _submitted(task, episode)
        except PatchError as exc:
            return Finding(0.0, VerdictStatus.FORMAT, detail=f"the patch does not apply: {exc}")
        if program is None:
            return Finding(0.0, VerdictStatus.NO_ANSWER, detail="no program was submitted")
        if sandbox is None:
            raise SandboxError("the code verifier needs a sandbox and was given none")
        starter, gold = str(task.hidden.get("starter", "")), task.hidden.get("gold")
        mine = await self._outcomes(task, program, tests, sandbox)
        touched = compare_files(task.public.get("files") or {}, episode.final_state.get("files"))
        solved = all(mine.passed.values())
        before = None if solved or not starter else await self._outcomes(task, starter, tests, sandbox)
        quotes = find_quotes(program, [starter, gold or ""], (Quotable.of(t.case, t.expected) for t in tests))
        copied = await self._copied(task, quotes, tests, mine, before, sandbox)
        tampered = mine.tampered or bool(touched.tests) or bool(copied)
        passed = solved and not tampered
        p = 1.0 if passed else progress(tests, mine, before)
        cost = patch_penalty(starter, program, gold, _budget(task), touched.lines) if starter else None
        price = cost[0].total if cost and self.priced else 0.0
        outcome = float(passed)
        return Finding(
            outcome,
            VerdictStatus.TAMPERED if tampered else _status(mine, passed),
            reward=0.0 if tampered else gated_reward(passed, p, price),
            components=_components(mine, _shown(task), outcome, p, cost, touched.lines),
            certificates=[] if tampered else await self._certificates(task, episode, tests, sandbox, passed),
            flags=[*_flags(mine, quotes, copied), *touched.flags()],
            detail="" if passed else f"{sum(mine.passed.values())} of {len(tests)} cases pass",
        )

    def compare(self, task: Task, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """Without gold, passing patches of one group are measured against the smallest of them, not the budget.

        A verdict that was measured so carries what it was measured against, and so stands for its group.
        """
        known = [v.components["diff_free"] for v in verdicts if v.provenance.get(REFERENCE) == SIBLING]
        known += [sum(v.components[key] for key in COST) for v in verdicts if v.passed and COST[0] in v.components]
        if not self.priced or task.hidden.get("gold") is not None or not known:
            return list(verdicts)
        return [_measured_against(min(known), v) if v.passed and COST[0] in v.components else v for v in verdicts]

    async def _copied(
        self, task: Task, quotes: Quotes, tests: list[Test], mine: Outcomes, before: Outcomes | None, sandbox: Sandbox
    ) -> set[str]:
        """The cases that hold only because the program quotes them; empty where that may be honest.

        A right program that needs no quotation proves that one quoted case is a fit; without one it takes two, in place
        of what the starting program did. In a failing program an answer is a fit even if no input is looked at.
        """
        gold, starter = task.hidden.get("gold"), task.hidden.get("starter")
        right = {key for key, held in mine.passed.items() if held}
        if quotes.cases & right and (gold is not None or starter):
            blotted = await self._outcomes(task, quotes.blotted, tests, sandbox)
            lost = {key for key, held in blotted.passed.items() if held != mine.passed[key]}
            if lost <= quotes.cases and len(lost) >= (1 if gold is not None else 2):
                return lost
        fixed = {key for key in right if before is not None and not before.passed[key]}
        return fixed if gold is not None and fixed <= quotes.answers and len(right) < len(tests) else set()

    async def _certificates(
        self, task: Task, episode: Episode, tests: list[Test], sandbox: Sandbox, passed: bool
    ) -> list[StepCertificate]:
        """Each edit by what it did to the tests; a lone edit that solves the task says no more than the verdict."""
        edits = find_edits(episode, str(task.public.get("program", task.hidden.get("starter", ""))))[-MAX_EDITS:]
        if passed and len(edits) == 1:
            edits = []
        programs = {source for edit in edits for source in (edit.before, edit.after)}
        found: dict[str, Mapping[str, bool]] = {}
        for source in sorted(programs):
            outcomes = await self._outcomes(task, source, tests, sandbox)
            if not outcomes.tampered:
                found[source] = outcomes.passed
        ids = {test.case.id for test in tests}
        return certify(episode, edit_steps(episode, edits, found, ids - _shown(task) or ids))

    async def _outcomes(self, task: Task, source: str, tests: list[Test], sandbox: Sandbox) -> Outcomes:
        """Cached by task and program; concurrent requests for the same pair share one run."""
        key = hashlib.sha256(f"{task.hash}\0{source}".encode("utf-8", "surrogatepass")).hexdigest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]

        async def run() -> Outcomes:
            found = await run_tests(task, source, tests, sandbox, self._limits)
            self._known[key] = found
            if len(self._known) > CACHED_PROGRAMS:
                self._known.popitem(last=False)
            return found

        return await self._share(key, run)

    async def _share(self, key: str, run: Callable[[], Coroutine[Any, Any, Outcomes]]) -> Outcomes:
        running = self._running.get(key)
        if running is None or running.get_loop() is not asyncio.get_running_loop():
            running = self._running[key] = asyncio.ensure_future(run())
            running.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(running)


class AnySizeCodeVerifier(CodeVerifier):
    """The same without the price of a large patch, which is still measured."""

    name: ClassVar[str] = "code_any_size"
    priced: ClassVar[bool] = False


async def run_tests(
    task: Task, source: str, tests: list[Test], sandbox: Sandbox, limits: SandboxLimits | None = None
) -> Outcomes:
    """Run every test once, in an order that depends on task and program only, with a canary among them.

    The canary evaluates a name that nothing can have defined: a program that makes it succeed has changed how cases are
    evaluated.

    Raises:
        SandboxError: if the sandbox failed, or did not answer every case.

    """
    canary = Case(id=f"canary-{secrets.token_hex(8)}", expression=f"x{secrets.token_hex(8)}")
    cases = [*(test.case for test in tests), canary]
    random.Random(f"{task.hash}{source}").shuffle(cases)
    program = Program(source, dict(task.public.get("files") or {}))
    with boundary(SandboxError, f"running the cases of task {task.id}"):
        results = await sandbox.run_cases(program, cases, limits)
    found = {result.id: result for result in results}
    if set(found) != {case.id for case in cases} or len(results) != len(cases):
        raise SandboxError(f"task {task.id}: {len(results)} results for {len(cases)} cases")
    return Outcomes(
        passed={test.case.id: test.holds(found[test.case.id]) for test in tests},
        statuses={test.case.id: found[test.case.id].status for test in tests},
        tampered=found[canary.id].status is CaseStatus.VALUE,
    )


def progress(tests: list[Test], mine: Outcomes, before: Outcomes | None) -> float:
    """p: weight of failing tests fixed less weight of passing tests broken, over the weight that failed; in [0, 1]."""
    failed_before = {test.case.id: before is None or not before.passed[test.case.id] for test in tests}
    total = sum(test.weight for test in tests if failed_before[test.case.id])
    fixed = sum(test.weight for test in tests if failed_before[test.case.id] and mine.passed[test.case.id])
    broken = sum(test.weight for test in tests if not failed_before[test.case.id] and not mine.passed[test.case.id])
    return min(1.0, max(0.0, (fixed - broken) / total)) if total else 0.0


def _submitted(task: Task, episode: Episode) -> str | None:
    """The program that was handed in, or the starting program with the patch that was; None if nothing was.

    Raises:
        PatchError: if the patch does not apply.

    """
    state = episode.final_state
    if not state.get("submitted"):
        return None
    if isinstance(patch := state.get("patch"), str):
        from agentopd_verifiers.patches import apply_patch  # its parser takes long to import

        return apply_patch(hidden_field(task, "starter", str), patch)
    program = state.get("program")
    return program if isinstance(program, str) else None


def _budget(task: Task) -> float:
    """``hidden.budget``: the cost, in changed lines, that is free where there is no gold patch to compare with."""
    budget = task.hidden.get("budget", DEFAULT_BUDGET)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise TaskError(f"hidden.budget is {budget!r}; give a number of changed lines above 0")
    return float(budget)


def _tests(task: Task) -> list[Test]:
    """Hidden and public cases, each id once."""
    rows = [*hidden_field(task, "cases", list), *(task.public.get("public_cases") or [])]
    tests: dict[str, Test] = {}
    for row in rows:
        test = _test(row)
        if tests.setdefault(test.case.id, test) != test:
            raise TaskError(f"two different cases have the id {test.case.id!r}")
    if not tests:
        raise TaskError("there are no cases")
    return list(tests.values())


def _test(row: Any) -> Test:
    try:
        args = tuple(map(decode_plain, row.get("args", [])))
        case = Case(str(row["id"]), row["expression"], row.get("setup", ""), args)
        expected, compare = decode_plain(row["expected"]), row.get("compare", "eq")
        tolerance = None if row.get("tolerance") is None else float(row["tolerance"])
        weight = float(row.get("weight", 1.0))
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise TaskError(f"malformed case {str(row)[:80]}: {type(exc).__name__}: {exc}") from exc
    if compare not in COMPARATORS:
        raise TaskError(f"case {case.id!r}: unknown comparator {compare!r}; known: {', '.join(sorted(COMPARATORS))}")
    return Test(case, expected, compare, tolerance, weight)


def _status(mine: Outcomes, passed: bool) -> VerdictStatus:
    """What most of the failing cases have in common."""
    if mine.tampered:
        return VerdictStatus.TAMPERED
    if passed:
        return VerdictStatus.OK
    failures = [_STATUS.get(mine.statuses[key], VerdictStatus.WRONG) for key, held in mine.passed.items() if not held]
    return Counter(failures).most_common(1)[0][0]


def _measured_against(free: float, verdict: Verdict) -> Verdict:
    """A passing verdict with its patch's size priced above ``free`` lines."""
    found = verdict.components
    size = penalty(sum(found[key] for key in COST), free, 0, 0).size
    price = Penalty(size, found["penalty_complexity"], found["penalty_unrelated"])
    changed = {"penalty": price.total, "penalty_size": size, "diff_free": free}
    return verdict.model_copy(
        update={
            "reward": gated_reward(True, 1.0, price.total),
            "components": found | changed,
            "provenance": verdict.provenance | {REFERENCE: SIBLING},
        }
    )


def _shown(task: Task) -> set[str]:
    """Ids of the cases that the student may see."""
    return {str(row["id"]) for row in task.public.get("public_cases") or ()}


def _components(
    mine: Outcomes, shown: set[str], outcome: float, p: float, cost: tuple[Penalty, Patch] | None, other_lines: int
) -> dict[str, float]:
    found = {
        "pass": outcome,
        "p": p,
        "cases": float(len(mine.passed)),
        "cases_passed": float(sum(mine.passed.values())),
        "shown": float(len(shown)),
        "shown_passed": float(sum(mine.passed[key] for key in shown)),
    }
    if cost is None:
        return found
    penalty, patch = cost
    return found | {
        "penalty": penalty.total,
        "penalty_size": penalty.size,
        "penalty_complexity": penalty.complexity,
        "penalty_unrelated": penalty.unrelated,
        "diff_lines": float(patch.lines),
        "diff_tokens": float(patch.tokens),
        "diff_ast": float(patch.nodes),
        "diff_cost": patch.cost,
        "diff_other": float(other_lines),
        "diff_parsed": float(patch.parsed),
    }


def _flags(mine: Outcomes, quotes: Quotes, copied: Collection[str]) -> list[Flag]:
    """What was found out, and suspicions; hidden values are counted, never shown."""
    flags = []
    if mine.tampered:
        flags.append(Flag(code="tampered", detail="a call that cannot succeed returned a value"))
    early = sum(status is CaseStatus.NO_RESULT for status in mine.statuses.values())
    if early:
        flags.append(Flag(code="early_exit", detail=f"{early} cases ended without a result"))
    odd = sum(status is CaseStatus.PROTOCOL for status in mine.statuses.values())
    if odd:
        flags.append(Flag(code="bad_result", detail=f"{odd} cases reported something that is not plain data"))
    if copied:
        flags.append(Flag(code="hardcoded", detail=f"{len(copied)} cases hold only because the patch quotes them"))
    elif quotes.cases:
        flags.append(Flag(code="quoted_cases", detail=f"the patch quotes {len(quotes.cases)} cases"))
    return flags
