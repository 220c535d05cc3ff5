"""Which edits fixed tests and which broke some: every program on the way is run by itself.

An edit is a recorded call that changed the program. Only tests that the student was not shown count as fixed, because a
program can be fitted to a test that is shown; any test counts as broken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from agentopd.types import Episode
from agentopd_verifiers.steps import Call, Sign, Step, malformed_steps, recorded_calls

MAX_EDITS = 4
"""Edits, counted from the last, whose programs are run; earlier ones are not known."""


@dataclass(frozen=True)
class Edit:
    """One call, and the program before and after it."""

    call: Call
    before: str
    after: str


def find_edits(episode: Episode, program: str) -> list[Edit]:
    """The edits of an episode that started from ``program``; [] where the log does not lead to its final program."""
    found: list[Edit] = []
    for call in recorded_calls(episode):
        for entry in call.event.data.get("changes") or ():
            if entry.get("path") == ["program"] and isinstance(entry.get("value"), str):
                found.append(Edit(call, program, entry["value"]))
                program = entry["value"]
    return found if program == episode.final_state.get("program") else []


def edit_steps(
    episode: Episode, edits: Sequence[Edit], passed: Mapping[str, Mapping[str, bool]], held_back: Collection[str]
) -> list[Step]:
    """Every call as a step. ``passed``: tests passed by id, of each program that ran and did not tamper."""
    known = {id(edit.call.event): edit for edit in edits if edit.before in passed and edit.after in passed}
    steps: list[Step] = []
    for call in recorded_calls(episode):
        sign: Sign = 0 if call.ok else -1
        kind, detail = ("call" if call.ok else "failed_call"), ""
        if edit := known.get(id(call.event)):
            sign, detail = _judge_edit(passed[edit.before], passed[edit.after], held_back)
            kind = "fixed_tests" if sign > 0 else "broke_tests"
        steps.append(Step(call.event.turn, sign, kind, call.span, detail))
    return [*steps, *malformed_steps(episode)]


def _judge_edit(before: Mapping[str, bool], after: Mapping[str, bool], held_back: Collection[str]) -> tuple[Sign, str]:
    fixed = [key for key in after if after[key] and not before[key]]
    broken = [key for key in after if before[key] and not after[key]]
    detail = f"{len(fixed)} fixed, {len(broken)} broken"
    if broken:
        return (0 if fixed else -1), detail
    return (1 if any(key in held_back for key in fixed) else 0), detail
