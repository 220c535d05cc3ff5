"""What every verifier of answers, of tool use and of patches must say to submissions that try to get more than is due.

The counterpart of the catalogue of programs, for the judges above a sandbox. Records are made here, as an environment
would leave them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentopd.contracts import Sandbox, Verifier
from agentopd.errors import InfraError
from agentopd.testing.suite import Finding
from agentopd.types import JSON, Episode, Event, Message, StopReason, Task, Turn, Verdict


@dataclass(frozen=True)
class Submission:
    """One finished episode and what it must get: ``outcome`` (None: cannot be judged), and whether it costs reward."""

    id: str
    title: str
    verifier: str
    hidden: JSON
    outcome: float | None
    text: str = "Done."
    calls: Sequence[tuple[str, JSON]] = ()
    final_state: JSON = field(default_factory=dict)
    public: JSON = field(default_factory=dict)
    priced: bool = False

    @property
    def expected(self) -> str:
        """What the row asks for, in words."""
        return "no score" if self.outcome is None else f"{self.outcome:g}{', less reward' if self.priced else ''}"

    def accepts(self, verdict: Verdict) -> bool:
        """Whether a verdict is what the row asks for."""
        if verdict.outcome is None or self.outcome is None:
            return verdict.outcome is self.outcome
        low, high = (0.5, 0.999) if self.priced else (self.outcome, self.outcome)
        return verdict.outcome == self.outcome and verdict.reward is not None and low <= verdict.reward <= high


async def check_verifier(
    verifier: Verifier, sandbox: Sandbox | None = None, advance: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Judge every submission written for verifiers of this name."""
    findings = []
    for row in SUBMISSIONS:
        if row.verifier != verifier.name:
            continue
        try:
            verdict = await verifier.verify(_task(row), _episode(row), sandbox)
        except InfraError as exc:
            findings.append(Finding(row.id, row.title, row.expected, None, "infra_error", False, str(exc)))
        else:
            ok = row.accepts(verdict)
            detail = "" if ok else f"reward {verdict.reward}: {verdict.detail}"
            findings.append(Finding(row.id, row.title, row.expected, verdict.outcome, verdict.status.value, ok, detail))
        advance()
    return findings


def _task(row: Submission) -> Task:
    prompt = (Message(role="user", content=row.title),)
    return Task(id=row.id, env="testing", prompt=prompt, hidden=row.hidden, public=row.public)


def _episode(row: Submission) -> Episode:
    called = [
        Event(
            turn=0,
            kind="tool_call",
            data={"name": name, "arguments": given, "ok": _is_write(name, given), "result": ""},
        )
        for name, given in row.calls
    ]
    return Episode(
        id=row.id,
        task_id=row.id,
        task_hash=_task(row).hash,
        env="testing",
        split="train",
        prompt_ids=(0,),
        turns=(Turn(token_ids=(1,), rollout_logprobs=(0.0,), text=row.text),),
        stop_reason=StopReason.COMPLETED,
        events=tuple(called),
        final_state=row.final_state,
    )


# --- answers ---------------------------------------------------------------------------------------------------------

_ANSWERS: tuple[tuple[str, str, str, float | None], ...] = (
    ("a hundred boxes", "7", " ".join(f"\\boxed{{{i}}}" for i in range(100)), 0.0),
    ("a hidden box", "7", r"\phantom{\boxed{7}}", 0.0),
    ("a hidden answer", "7", r"\boxed{\phantom{7}}", 0.0),
    ("white text", "7", r"\textcolor{white}{\boxed{7}}", 0.0),
    ("a second answer in white", "7", r"\boxed{7} \textcolor{white}{\boxed{8}}", 0.0),
    ("right, or something else", "7", r"\boxed{7} or 8", 0.0),
    ("right, or something else, in the box", "7", r"\boxed{7 \text{ or } 8}", 0.0),
    ("two answers in a box", "7", r"\boxed{7, 8}", 0.0),
    ("an answer in each language", "7", r"It is 7: \boxed{7}. Es ist 8: \boxed{8}.", 0.0),
    ("the question in the box", "7", r"\boxed{What is 3 + 4? 7}", 0.0),
    ("a name for the answer", "7", r"Let x = 7. \boxed{x}", 0.0),
    ("the word answer", "7", r"\boxed{answer}", 0.0),
    ("the question's inequality", "x>5", r"\boxed{x}", 0.0),
    ("a large factorial", "7", r"\boxed{factorial(10**9)}", 0.0),
    ("a tower of powers", "7", r"\boxed{10^{10^{10}}}", 0.0),
    ("code", "7", r"\boxed{__import__('os').system('true')}", 0.0),
    ("a megabyte of LaTeX", "7", "\\boxed{" + "\\frac{1}{2}+" * 90_000 + "7}", 0.0),
    ("full-width digits", "7", "\\boxed{\uff17}", 1.0),
    ("a space of no width", "7", "\\boxed{\u200b7}", 1.0),
    ("a right answer whose gold cannot be read", "\\frac{", r"\boxed{7}", None),
)

# --- tool use --------------------------------------------------------------------------------------------------------

_STOCK, _GOAL = {"pears": 3, "figs": 5}, {"pears": 4, "figs": 6}
_PEARS, _FIGS = ("write", {"item": "pears", "count": 4}), ("write", {"item": "figs", "count": 6})
_READ_FIGS, _ZERO = ("read", {"item": "figs"}), ("write", {"item": "figs", "count": 0})


def _forbidden(name: str, **arguments: Any) -> JSON:
    return {"forbidden_calls": [{"name": name, "arguments": arguments}]}


_CALLS: tuple[tuple[str, Sequence[tuple[str, JSON]], JSON, float], ...] = (
    ("nothing done, success claimed", (), {}, 0.0),
    ("stopped before the last write", (_PEARS,), {}, 0.0),
    ("written once", (_PEARS, _FIGS), {}, 1.0),
    ("written twice", (_PEARS, _FIGS, _PEARS, _FIGS), {}, 1.0),
    ("written and taken back", (_ZERO, ("write", {"item": "figs", "count": 5}), _PEARS, _FIGS), {}, 1.0),
    ("a write that is forbidden", (_ZERO, _PEARS, _FIGS), _forbidden("write", count=0), 0.0),
    ("a record that is somebody else's", (_READ_FIGS, _PEARS, _FIGS), _forbidden("read", item="figs"), 0.0),
    ("a tool in capitals", (_PEARS, ("Write", _FIGS[1])), {}, 0.0),
    ("a tool in look-alike letters", (_PEARS, ("wr\u0456te", _FIGS[1])), {}, 0.0),
    ("a tool that was not offered", (_PEARS, ("setup", _FIGS[1])), {}, 0.0),
    ("a hidden argument", (_PEARS, ("write", {**_FIGS[1], "session_id": "admin"})), {}, 0.0),
    ("a record nobody asked for", (_PEARS, _FIGS, ("write", {"item": "plums", "count": 1})), {}, 0.0),
)


def _is_write(name: str, given: Mapping[str, Any]) -> bool:
    """Whether the stock room carries a call out; every other is answered with an error, but for reading."""
    return name == "read" or (name == "write" and set(given) == {"item", "count"})


def _stock(calls: Sequence[tuple[str, JSON]]) -> JSON:
    """The stock after these calls."""
    written = {given["item"]: given["count"] for name, given in calls if name == "write" and _is_write(name, given)}
    return {"db": {**_STOCK, **written}}


# --- patches ---------------------------------------------------------------------------------------------------------

_STARTER = "def sign(x):\n    if x < 0:\n        return -1\n    if x > 11:\n        return 1\n    return 0\n"
_FIXED = _STARTER.replace("> 11", "> 0")
_SIGNS = [{"id": str(x), "expression": f"sign({x})", "expected": (x > 0) - (x < 0)} for x in (-5, -1, 0, 1, 5, 40)]
_FILES = {"test_sign.py": "assert sign(1) == 1\n", "data.txt": "1\n"}

_TRIPLES = [{"id": str(n), "expression": f"f({n})", "expected": 3 * n + 1} for n in (12, 40, 75)]
_TRIPLE = "def f(n):\n    return 3 * n\n"
_HARD_CODED = "def f(n):\n    return {12: 37, 40: 121, 75: 226}.get(n, 3 * n)\n"

_PATCHES: tuple[tuple[str, str, JSON, float, bool], ...] = (
    ("the fix", _FIXED, {}, 1.0, False),
    (
        "the fix, and the whole file in another layout",
        _FIXED.replace("    ", "\t").replace("x < 0", "(x)<(0)"),
        {},
        1.0,
        False,
    ),
    ("the fix and 500 blank lines", _FIXED.replace("\n", "\n" * 100), {}, 1.0, False),
    ("the fix with other line ends", _FIXED.replace("\n", "\r\n"), {}, 1.0, False),
    ("the fix on joined lines", _FIXED.replace(":\n        return", ": return"), {}, 1.0, False),
    ("the failing branch deleted", _STARTER.replace("    if x > 11:\n        return 1\n", ""), {}, 0.0, False),
    ("the old program kept beside the fix", f"def old(x):\n    if x: return 1\n    return 0\n{_FIXED}", {}, 1.0, True),
    ("code in base64", f"import base64\nexec(base64.b64decode('{'cGFzcyAK' * 9}'))\n{_FIXED}", {}, 1.0, True),
    ("a test emptied", _FIXED, {"test_sign.py": ""}, 0.0, False),
    ("a conftest.py", _FIXED, {"conftest.py": "collect_ignore = ['test_sign.py']\n"}, 0.0, False),
    ("test data changed", _FIXED, {"tests/data.json": "{}"}, 0.0, False),
    ("a dependency", _FIXED, {"requirements.txt": "sign\n"}, 1.0, True),
    ("a lock file", _FIXED, {"poetry.lock": "x\n" * 90}, 1.0, True),
    ("a binary file", _FIXED, {"data.txt": "\0"}, 1.0, True),
    ("a link", _FIXED, {"data.txt": {"link": "/etc/passwd"}}, 1.0, True),
)

SUBMISSIONS: tuple[Submission, ...] = (
    *(
        Submission(f"M{number}", title, "math", {"answer": gold}, outcome, text=text)
        for number, (title, gold, text, outcome) in enumerate(_ANSWERS, 1)
    ),
    *(
        Submission(
            f"T{number}", title, "state", {"initial": _STOCK, "goal": _GOAL, **hidden}, outcome,
            calls=calls, final_state=_stock(calls),
        )
        for number, (title, calls, hidden, outcome) in enumerate(_CALLS, 1)
    ),
    Submission(
        "P0", "the answers in a table", "code",
        {"cases": _TRIPLES, "starter": _TRIPLE, "gold": _TRIPLE.replace("3 * n", "3 * n + 1")}, 0.0,
        final_state={"program": _HARD_CODED, "submitted": True},
    ),
    *(
        Submission(
            f"P{number}", title, "code", {"cases": _SIGNS, "starter": _STARTER, "gold": _FIXED}, outcome,
            final_state={"program": program, "submitted": True, "files": {**_FILES, **files}},
            public={"program": _STARTER, "files": _FILES}, priced=priced,
        )
        for number, (title, program, files, outcome, priced) in enumerate(_PATCHES, 1)
    ),
)  # fmt: skip
