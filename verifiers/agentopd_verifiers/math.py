"""The math verifier: a strict stage that decides most answers alone, and a symbolic stage for the rest.

Where both stages have a say (sets, tuples, intervals) and disagree, the verdict is ``ambiguous``: no outcome, never
trained on.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from agentopd.contracts import Sandbox
from agentopd.errors import TaskError
from agentopd.types import Episode, Flag, Task, VerdictStatus
from agentopd_verifiers import arithmetic, strict
from agentopd_verifiers.extract import WINDOW, Extracted, extract_answer
from agentopd_verifiers.judge import Finding, JudgingVerifier, hidden_field
from agentopd_verifiers.latex import excess, tidy
from agentopd_verifiers.steps import Step, certify
from agentopd_verifiers.symbolic import Mode, SymbolicPool, SymbolicResult, SymbolicStatus

Stage = Literal["strict", "symbolic", "both"]
_CONSTANT = re.compile(r"\s*\+\s*[CcK]$")
_SHOWN = 200


@dataclass(frozen=True)
class Equivalence:
    """Whether an answer equals the gold one, which stage said so, and what each side was read as.

    ``status`` is ``ok``, ``wrong``, ``timeout``, ``resource``, ``ambiguous`` or ``task_error`` (unreadable gold).
    """

    status: VerdictStatus
    stage: Stage
    gold: str
    answer: str
    detail: str = ""

    @property
    def equal(self) -> bool | None:
        """True, False, or None where it could not be judged."""
        return None if self.status in _UNJUDGED else self.status is VerdictStatus.OK


_UNJUDGED = (VerdictStatus.AMBIGUOUS, VerdictStatus.TASK_ERROR)
_STATUS = {
    SymbolicStatus.EQUAL: VerdictStatus.OK,
    SymbolicStatus.DIFFERENT: VerdictStatus.WRONG,
    SymbolicStatus.BAD_ANSWER: VerdictStatus.WRONG,
    SymbolicStatus.BAD_GOLD: VerdictStatus.TASK_ERROR,
    SymbolicStatus.UNDECIDED: VerdictStatus.AMBIGUOUS,
    SymbolicStatus.TIMEOUT: VerdictStatus.TIMEOUT,
    SymbolicStatus.RESOURCE: VerdictStatus.RESOURCE,
}


class MathVerifier(JudgingVerifier):
    """Compares the final answer of an episode with ``hidden.answer``.

    ``hidden.significant`` (default 6) is how many digits a decimal must show to stand for an exact value.
    """

    name: ClassVar[str] = "math"
    version: ClassVar[str] = "1"

    def __init__(self, workers: int = 2) -> None:
        self._pool = SymbolicPool(workers)

    async def judge(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Finding:
        """Outcome 1 if the extracted answer equals the gold answer."""
        gold = str(hidden_field(task, "answer", (str, int, float)))
        significant = task.hidden.get("significant", 6)
        if not isinstance(significant, int) or significant < 1:
            raise TaskError(f"hidden.significant is {significant!r}; give a number of digits")
        steps = worked_lines(episode)
        signs = [step.sign for step in steps]
        finding = await self._judge_answer(gold, episode.final_text, significant)
        return replace(
            finding,
            components={"steps_right": float(signs.count(1)), "steps_wrong": float(signs.count(-1))},
            certificates=certify(episode, steps),
        )

    async def _judge_answer(self, gold: str, text: str, significant: int) -> Finding:
        found = extract_answer(text)
        if found is None:
            return Finding(0.0, VerdictStatus.NO_ANSWER, detail="no final answer found")
        if found.refused:
            flag = Flag(code="refused_answer", detail=found.refused)
            return Finding(0.0, VerdictStatus.FORMAT, flags=[flag], detail=found.refused)
        verdict = await self._equivalent(gold, found.text, significant)
        outcome = None if verdict.equal is None else float(verdict.equal)
        return Finding(
            outcome,
            verdict.status,
            detail=verdict.detail,
            evidence=_evidence(found, verdict),
        )

    def equivalent(self, gold: str, answer: str, significant: int = 6) -> Equivalence:
        """Whether two answers, as bare or delimited LaTeX or inside prose, are the same. Blocks; needs no episode.

        Raises:
            InfraError: if the symbolic stage's machinery failed.

        """
        sides = [extract_answer(text, anywhere=True) for text in (gold, answer)]
        if sides[0] is None:
            return Equivalence(VerdictStatus.TASK_ERROR, "strict", "", "", "the gold answer is empty")
        if sides[1] is None:
            return Equivalence(VerdictStatus.WRONG, "strict", sides[0].text, "", "no answer")
        if sides[1].refused:
            return Equivalence(VerdictStatus.WRONG, "strict", sides[0].text, sides[1].text[:_SHOWN], sides[1].refused)
        return self._decide(sides[0].text, sides[1].text, significant)

    def close(self) -> None:
        """Stop the symbolic workers; idempotent."""
        self._pool.close()

    async def _equivalent(self, gold: str, answer: str, significant: int) -> Equivalence:
        extracted = extract_answer(gold, anywhere=True)
        if extracted is None:
            raise TaskError("hidden.answer is empty")
        quick = _strict_stage(extracted.text, answer, significant)
        if isinstance(quick, Equivalence):
            return quick
        return await asyncio.to_thread(self._decide, extracted.text, answer, significant)

    def _decide(self, gold: str, answer: str, significant: int) -> Equivalence:
        """Both stages; every obligation must hold."""
        quick = _strict_stage(gold, answer, significant)
        if isinstance(quick, Equivalence):
            return quick
        worst: Equivalence | None = None
        for pair in quick:
            verdict = self._confirm(pair, significant)
            if verdict.equal is False:
                return verdict
            if worst is None or verdict.equal is None:
                worst = verdict
        assert worst
        return worst

    def _confirm(self, pair: _Pair, significant: int) -> Equivalence:
        mode: Mode = "antiderivative" if _CONSTANT.search(pair.gold) else "equal"
        sides = (_CONSTANT.sub("", pair.gold), _CONSTANT.sub("", pair.answer)) if mode != "equal" else pair.texts
        found = self._pool.check(*sides, mode=mode, significant=significant)
        return _combine(pair, found)


@dataclass(frozen=True)
class _Pair:
    """One obligation the strict stage leaves open, with its opinion if it has one."""

    gold: str
    answer: str
    opinion: bool | None

    @property
    def texts(self) -> tuple[str, str]:
        return self.gold, self.answer


def worked_lines(episode: Episode) -> list[Step]:
    """Every line the student wrote, re-computed; lines that are not plain arithmetic stay unknown."""
    return [
        Step(index, line.sign, "arithmetic", (line.start, line.end), line.detail)
        for index, turn in enumerate(episode.turns)
        for line in arithmetic.check_lines(turn.text[-WINDOW:], max(0, len(turn.text) - WINDOW))
    ]


def _strict_stage(gold: str, answer: str, significant: int) -> Equivalence | list[_Pair]:
    """The verdict, or what is left for the symbolic stage."""
    shown = (gold[:_SHOWN], answer[:_SHOWN])
    if gold.strip() == answer.strip():
        return Equivalence(VerdictStatus.OK, "strict", *shown)
    limits = ((answer, "the answer", VerdictStatus.RESOURCE), (gold, "hidden.answer", VerdictStatus.TASK_ERROR))
    for text, whose, status in limits:
        # What is parsed is tidied: that turns full-width brackets into brackets, and joins digits.
        if problem := excess(text) or excess(tidy(text)):
            return Equivalence(status, "strict", *shown, detail=f"{whose} has {problem}")
    pairs = strict.obligations(gold, answer)
    if pairs is None:
        return Equivalence(VerdictStatus.WRONG, "strict", *shown, detail="an equation needs an equation")
    open_pairs: list[_Pair] = []
    for left, right in pairs:
        a, b = strict.parse(left), strict.parse(right)
        opinion = strict.same(a, b, significant)
        shown = (str(a)[:_SHOWN], str(b)[:_SHOWN])
        both_groups = isinstance(a, strict.Group) and isinstance(b, strict.Group)
        if opinion is False and not both_groups:
            return Equivalence(VerdictStatus.WRONG, "strict", *shown)
        if opinion is None or both_groups:
            open_pairs.append(_Pair(tidy(left), tidy(right), opinion))
    return open_pairs or Equivalence(VerdictStatus.OK, "strict", *shown)


def _combine(pair: _Pair, found: SymbolicResult) -> Equivalence:
    """A strict opinion stands where the symbolic stage has none; where both have one they must agree."""
    shown = (pair.gold[:_SHOWN], pair.answer[:_SHOWN])
    decided = found.status in (SymbolicStatus.EQUAL, SymbolicStatus.DIFFERENT)
    if pair.opinion is None:
        return Equivalence(_STATUS[found.status], "symbolic", *shown, detail=found.detail)
    mine = VerdictStatus.OK if pair.opinion else VerdictStatus.WRONG
    if not decided:
        return Equivalence(mine, "strict", *shown)
    if _STATUS[found.status] is mine:
        return Equivalence(mine, "both", *shown)
    detail = f"the strict stage says {mine}, the symbolic stage {found.status}"
    return Equivalence(VerdictStatus.AMBIGUOUS, "both", *shown, detail=detail)


def _evidence(found: Extracted, verdict: Equivalence) -> dict[str, str]:
    agreement = {"strict": "alone", "symbolic": "alone", "both": "agree"}[verdict.stage]
    return {
        "extracted": found.text[:_SHOWN],
        "extraction": found.method,
        "gold_canonical": verdict.gold,
        "canonical": verdict.answer,
        "stage": verdict.stage,
        "agreement": "disagree" if verdict.status is VerdictStatus.AMBIGUOUS else agreement,
    }
