"""The code verifier, against a plain child process and against the real jail."""

import asyncio

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.errors import InfraError, SandboxError
from agentopd.types import VerdictStatus
from agentopd_sandboxes.jail import JailSandbox
from agentopd_verifiers.code import CodeVerifier

STARTER = "def f(x, y):\n    return x + y\n\n\ndef g(x):\n    return x\n"
GOLD = STARTER.replace("x + y", "x * y")
CASES = [
    {"id": "zero", "expression": "f(0, 0)", "expected": 0},
    {"id": "two", "expression": "f(2, 2)", "expected": 4},
    {"id": "big", "expression": "f(*args)", "args": [211, 307], "expected": 64777},
    {"id": "odd", "expression": "f(three, 5)", "setup": "three = 3", "expected": 15.0},
]


@pytest.fixture
def task(make_task):
    shown = [{"id": "shown", "expression": "f(3, 4)", "expected": 12}]
    public = {"program": STARTER, "files": {}, "entry_point": "f", "public_cases": shown}
    return make_task({"cases": CASES, "gold": GOLD, "starter": STARTER}, public)


@pytest.fixture
def submit(make_episode):
    def build(program, submitted=True):
        return make_episode(final_state={"program": program, "submitted": submitted})

    return build


def test_gold_scores_one_in_a_single_run(task, submit, judge, process_sandbox):
    verdict = judge(CodeVerifier(), task, submit(GOLD), process_sandbox)
    assert (verdict.outcome, verdict.reward, verdict.status) == (1.0, 1.0, VerdictStatus.OK)
    assert len(process_sandbox.runs) == 1
    assert verdict.provenance["sandbox"] == "process"
    assert verdict.provenance["capabilities"] == "pid"
    assert verdict.flags == ()


def test_the_starter_scores_zero(task, submit, judge, process_sandbox):
    verdict = judge(CodeVerifier(), task, submit(STARTER), process_sandbox)
    assert (verdict.outcome, verdict.reward, verdict.components["p"]) == (0.0, 0.0, 0.0)
    assert verdict.status is VerdictStatus.WRONG
    assert verdict.components["diff_lines"] == 0.0
    assert len(process_sandbox.runs) == 1


def test_partial_credit_counts_fixed_less_broken(task, submit, judge, process_sandbox):
    half = STARTER.replace("x + y", "x * y if x < 10 else 0")
    verdict = judge(CodeVerifier(), task, submit(half), process_sandbox)
    assert verdict.components["p"] == pytest.approx(2 / 3)
    assert verdict.reward == pytest.approx(0.2 * 2 / 3)
    breaking = STARTER.replace("x + y", "x * y if x < 10 and x != 2 else 1")
    verdict = judge(CodeVerifier(), task, submit(breaking), process_sandbox)
    assert verdict.components["p"] == pytest.approx(1 / 3)
    assert len(process_sandbox.runs) == 4


def test_a_needlessly_large_patch_passes_but_earns_less(task, submit, judge, process_sandbox):
    large = GOLD.replace("def g(x):\n    return x", "def g(x):\n    y = x\n    z = y\n    return z")
    verdict = judge(CodeVerifier(), task, submit(large), process_sandbox)
    assert verdict.outcome == 1.0
    assert 0.5 <= verdict.reward < 1.0
    assert verdict.components["penalty_unrelated"] > 0
    assert verdict.reward == pytest.approx(1 - verdict.components["penalty"])


@pytest.mark.parametrize(
    ("program", "status", "flags"),
    [
        ("import sys; sys.exit(0)", VerdictStatus.WRONG, {"early_exit"}),
        ("import os; os._exit(0)", VerdictStatus.WRONG, {"early_exit"}),
        ("def f(x, y:", VerdictStatus.WRONG, set()),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", VerdictStatus.CRASH, set()),
        (
            "class E:\n    def __eq__(self, other): return True\ndef f(x, y): return E()",
            VerdictStatus.WRONG,
            {"bad_result"},
        ),
        ("def f(x, y): return True", VerdictStatus.WRONG, set()),
        ("print('ALL TESTS PASSED')", VerdictStatus.WRONG, set()),
        ("import builtins\nbuiltins.eval = lambda *a: 0", VerdictStatus.TAMPERED, {"tampered"}),
    ],
)
def test_hostile_programs_score_zero(task, submit, judge, process_sandbox, program, status, flags):
    verdict = judge(CodeVerifier(), task, submit(program), process_sandbox)
    assert (verdict.outcome, verdict.reward, verdict.status) == (0.0, 0.0, status)
    assert {flag.code for flag in verdict.flags} == flags


def test_hard_coded_answers_are_flagged_and_lose_on_the_other_cases(task, submit, judge, process_sandbox):
    program = STARTER.replace("return x + y", "return {(211, 307): 64777}.get((x, y), x + y)")
    verdict = judge(CodeVerifier(), task, submit(program), process_sandbox)
    assert verdict.outcome == 0.0
    assert [flag.code for flag in verdict.flags] == ["hardcoded"]
    assert "64777" not in verdict.model_dump_json()


def test_nothing_submitted(task, submit, make_episode, judge, process_sandbox):
    for episode in (submit(GOLD, submitted=False), make_episode(), submit(None)):
        verdict = judge(CodeVerifier(), task, episode, process_sandbox)
        assert (verdict.outcome, verdict.status) == (0.0, VerdictStatus.NO_ANSWER)
    assert process_sandbox.runs == []


def test_expectations_never_go_in_and_the_canary_is_fresh(task, submit, judge, process_sandbox):
    for program in (GOLD, GOLD + "\n"):
        judge(CodeVerifier(), task, submit(program), process_sandbox)
    canaries = [case for run in process_sandbox.runs for case in run if case.startswith("canary")]
    assert len(set(canaries)) == 2
    order = [[case for case in run if not case.startswith("canary")] for run in process_sandbox.runs]
    assert sorted(order[0]) == sorted(["shown", *(case["id"] for case in CASES)])


def test_equal_programs_run_once_and_get_equal_verdicts(task, submit, process_sandbox):
    verifier = CodeVerifier()

    async def group():
        episodes = [submit(STARTER.replace("+", "-")) for _ in range(4)]
        return await asyncio.gather(*(verifier.verify(task, episode, process_sandbox) for episode in episodes))

    verdicts = asyncio.run(group())
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert len(process_sandbox.runs) == 2
    assert asyncio.run(verifier.verify(task, submit(STARTER.replace("+", "-")), process_sandbox)) == verdicts[0]
    assert len(process_sandbox.runs) == 2


class BrokenSandbox:
    name, capabilities = "broken", frozenset()

    def __init__(self, answer):
        self.answer = answer

    async def run_cases(self, program, cases, limits=None):
        return self.answer(cases)


def fail(_):
    raise OSError("no space left")


@pytest.mark.parametrize(
    "answer",
    [
        fail,
        lambda cases: [],
        lambda cases: [CaseResult(cases[0].id, CaseStatus.VALUE, 1)] * len(cases),
        lambda cases: [CaseResult(f"x{case.id}", CaseStatus.VALUE, 1) for case in cases],
    ],
)
def test_a_sandbox_fault_is_never_a_score(task, submit, judge, answer):
    verifier = CodeVerifier()
    with pytest.raises(SandboxError):
        judge(verifier, task, submit(GOLD), BrokenSandbox(answer))
    with pytest.raises(InfraError, match="needs a sandbox"):
        judge(verifier, task, submit(GOLD), None)


@pytest.mark.parametrize(
    "cases",
    [
        [],
        [{"id": "a"}],
        [{"id": "a", "expression": "1", "expected": 1, "compare": "like"}],
        [{"id": "a", "expression": "1", "expected": {"$x": 1}}],
        [{"id": "a", "expression": "1", "expected": 1}, {"id": "a", "expression": "1", "expected": 2}],
        [{"id": "a", "expression": "1", "expected": 1, "tolerance": "small"}],
        "x",
    ],
)
def test_malformed_cases_are_the_tasks_fault(make_task, submit, judge, process_sandbox, cases):
    verdict = judge(CodeVerifier(), make_task({"cases": cases}), submit(GOLD), process_sandbox)
    assert verdict.status is VerdictStatus.TASK_ERROR


def test_a_task_without_a_starter_has_no_penalty(make_task, submit, judge, process_sandbox):
    task = make_task({"cases": CASES})
    assert judge(CodeVerifier(), task, submit("def f(x, y):\n    return x * y"), process_sandbox).reward == 1.0
    verdict = judge(CodeVerifier(), task, submit("def f(x, y):\n    return 4"), process_sandbox)
    assert verdict.components["p"] == pytest.approx(1 / 4)


# --- the real sandbox ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jail_available():
    async def attempt():
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
        finally:
            await sandbox.aclose()

    try:
        asyncio.run(attempt())
    except SandboxError as exc:
        pytest.skip(f"no namespace jail on this machine: {exc}")


def test_in_the_jail(jail_available, task, submit):
    programs = {
        GOLD: VerdictStatus.OK,
        STARTER: VerdictStatus.WRONG,
        "import os; os._exit(0)": VerdictStatus.WRONG,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": VerdictStatus.CRASH,
        "class E(int):\n    def __eq__(self, other): return True\ndef f(x, y): return E()": VerdictStatus.WRONG,
    }

    async def run():
        sandbox, verifier = JailSandbox(workers=1), CodeVerifier()
        await sandbox.start()
        try:
            return [await verifier.verify(task, submit(program), sandbox) for program in programs]
        finally:
            await sandbox.aclose()

    verdicts = asyncio.run(run())
    assert [verdict.status for verdict in verdicts] == list(programs.values())
    assert [verdict.outcome for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert verdicts[0].provenance["sandbox"] == "jail"
