"""The code verifier, against a plain child process and against the real jail."""

import asyncio

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.errors import InfraError, SandboxError
from agentopd.types import VerdictStatus
from agentopd_envs import tool_turn
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_sandboxes.jail import JailSandbox
from agentopd_verifiers.code import CodeVerifier
from agentopd_verifiers.edits import find_edits

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


# --- patches, files and budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch",
    [
        "def f(x, y):\n    return x * y\n",
        "<<<<<<< SEARCH\n    return x + y\n=======\n    return x * y\n>>>>>>> REPLACE\n",
        "--- a/p.py\n+++ b/p.py\n@@ -1,2 +1,2 @@\n def f(x, y):\n-    return x + y\n+    return x * y\n",
    ],
)
def test_a_patch_is_applied_to_the_starting_program(task, make_episode, judge, process_sandbox, patch):
    episode = make_episode(final_state={"patch": patch, "submitted": True})
    verdict = judge(CodeVerifier(), task, episode, process_sandbox)
    assert (verdict.outcome, verdict.reward, verdict.components["diff_tokens"]) == (1.0, 1.0, 1.0)


def test_a_patch_that_does_not_apply_is_a_verdict(task, make_episode, judge, process_sandbox):
    patch = "<<<<<<< SEARCH\nnot there\n=======\nx\n>>>>>>> REPLACE\n"
    episode = make_episode(final_state={"patch": patch, "submitted": True})
    verdict = judge(CodeVerifier(), task, episode, process_sandbox)
    assert (verdict.outcome, verdict.reward, verdict.status) == (0.0, 0.0, VerdictStatus.FORMAT)
    assert verdict.detail == "the patch does not apply: SEARCH block 1: text not found"
    assert process_sandbox.runs == []


@pytest.mark.parametrize(
    ("files", "outcome", "flags"),
    [
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": "1\n2"}, 1.0, []),
        ({"test_f.py": "", "data.txt": "1\n2"}, 0.0, ["edited_tests"]),
        ({"data.txt": "1\n2"}, 0.0, ["edited_tests"]),
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": "1\n2", "conftest.py": ""}, 0.0, ["edited_tests"]),
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": "1\r\n2\r\n"}, 1.0, ["unrelated_files"]),
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": "1\n2", "poetry.lock": "x\n" * 90}, 1.0, ["unrelated_files"]),
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": "\0"}, 1.0, ["unrelated_files"]),
        ({"test_f.py": "assert f(2, 2) == 4", "data.txt": {"link": "/etc/passwd"}}, 1.0, ["unrelated_files"]),
    ],
)
def test_other_files_are_never_run_and_always_count(
    make_task, judge, make_episode, files, outcome, flags, process_sandbox
):
    shipped = {"test_f.py": "assert f(2, 2) == 4", "data.txt": "1\n2"}
    task = make_task({"cases": CASES, "gold": GOLD, "starter": STARTER}, {"program": STARTER, "files": shipped})
    state = {"program": GOLD, "submitted": True, "files": files}
    verdict = judge(CodeVerifier(), task, make_episode(final_state=state), process_sandbox)
    assert (verdict.outcome, [flag.code for flag in verdict.flags]) == (outcome, flags)
    if "edited_tests" in flags:
        assert (verdict.status, verdict.reward) == (VerdictStatus.TAMPERED, 0.0)
    elif flags:
        assert 0.5 <= verdict.reward < 1.0 and verdict.components["penalty_unrelated"] > 0


def test_without_gold_the_budget_is_free(make_task, submit, judge, process_sandbox):
    large = GOLD.replace("    return x * y", "    total = 0\n    total += x * y\n    total += 0\n    return total")
    rewards = []
    for budget in ({"budget": 2}, {}, {"budget": 40}):
        task = make_task({"cases": CASES, "starter": STARTER, **budget})
        rewards.append(judge(CodeVerifier(), task, submit(large), process_sandbox).reward)
    assert rewards[0] < rewards[1] == rewards[2] == 1.0
    task = make_task({"cases": CASES, "starter": STARTER, "budget": 0})
    assert judge(CodeVerifier(), task, submit(large), process_sandbox).status is VerdictStatus.TASK_ERROR


# --- certificates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repair(task, act, judge, certified, process_sandbox):
    """Play edits and a hand-in in the real environment; the verdict, and what it certifies."""

    def run(*turns, submit=True):
        last = (tool_turn("submit"),) if submit else ()
        episode = act(CodeRepairEnvironment, task, [*turns, *last], process_sandbox)
        verdict = judge(CodeVerifier(), task, episode, process_sandbox)
        return verdict, [(turn, sign, kind) for turn, sign, kind, _ in certified(verdict, episode)]

    return run


def edit(old, new):
    return tool_turn("edit", old=old, new=new)


def test_a_lone_edit_that_solves_the_task_costs_one_run(repair, process_sandbox):
    verdict, found = repair(edit("x + y", "x * y"))
    assert verdict.passed and found == []
    assert len(process_sandbox.runs) == 1


def test_each_edit_is_judged_by_what_it_alone_did(repair):
    verdict, found = repair(
        edit("x + y", "x * y if x < 10 else 0"),
        edit("not there", "x"),
        edit("x * y if x < 10 else 0", "0"),
        edit("0", "x * y"),
        edit("return x\n", "return x  # same\n"),
    )
    assert verdict.passed
    assert found == [(0, 1, "fixed_tests"), (1, -1, "failed_call"), (2, -1, "broke_tests"), (3, 1, "fixed_tests")]
    details = [item.detail for item in verdict.certificates]
    assert details == ["2 fixed, 0 broken", "", "0 fixed, 3 broken", "4 fixed, 0 broken"]


def test_only_the_last_edits_are_run(repair):
    turns = [edit("x + y", "x * y if x < 10 else 0"), *[edit("def g", "#\ndef g")] * 4]
    _, found = repair(*turns)
    assert found == []


def test_a_good_edit_of_a_failed_episode_is_good(repair, process_sandbox):
    verdict, found = repair(edit("x + y", "x * y if x < 10 else 0"))
    assert verdict.outcome == 0.0
    assert found == [(0, 1, "fixed_tests")]
    assert len(process_sandbox.runs) == 2


def test_fitting_the_case_that_was_shown_is_not_a_good_edit(repair):
    verdict, found = repair(edit("x + y", "12 if x == 3 and y == 4 else x + y"))
    assert verdict.outcome == verdict.reward == 0.0 and verdict.components["p"] > 0
    assert verdict.components["shown_passed"] == verdict.components["shown"] == 1
    assert found == []


def test_a_program_that_tampers_certifies_nothing(repair):
    verdict, found = repair(edit("def g", "import builtins\nbuiltins.eval = lambda *a: 0\ndef g"))
    assert verdict.status is VerdictStatus.TAMPERED and found == []


def test_nothing_handed_in_certifies_nothing(repair, process_sandbox):
    verdict, found = repair(edit("x + y", "x * y"), submit=False)
    assert verdict.status is VerdictStatus.NO_ANSWER and found == []
    assert process_sandbox.runs == []


def test_a_log_that_does_not_lead_to_the_program_certifies_no_edit(make_episode):
    episode = make_episode(calls=[("edit", {}, True)], final_state={"program": GOLD})
    assert find_edits(episode, STARTER) == []
    log = [{"path": ["program"], "value": GOLD}]
    event = episode.events[0].model_copy(update={"data": {"name": "edit", "ok": True, "changes": log}})
    (only,) = find_edits(episode.model_copy(update={"events": (event,)}), STARTER)
    assert (only.before, only.after) == (STARTER, GOLD)


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
