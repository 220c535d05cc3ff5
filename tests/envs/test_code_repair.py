"""Code repair: edits, the cases shown, the hand-in."""

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.errors import EnvironmentFault
from agentopd.types import Task
from agentopd_envs import tool_turn
from agentopd_envs.cases import expectation, report, to_case
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_verifiers.plain import encode_plain

PROGRAM = "def f(a, b):\n    return a - b - 1\n"


def task(**public) -> Task:
    cases = [{"id": "c", "expression": "f(*args)", "args": [3, 4], "expected": 8}]
    body = {"program": PROGRAM, "files": {}, "entry_point": "f", "public_cases": cases, **public}
    return CodeRepairEnvironment.new_task("fix it", public=body)


def contents(played) -> list[str]:
    return [message.content for message in played.seen[1:]]


def test_edits_apply_to_exactly_one_place(play):
    turns = [
        tool_turn("edit", old="a - b", new="a + b"),
        tool_turn("edit", old="not there", new=""),
        tool_turn("edit", old="a", new="x"),
        tool_turn("edit", old="", new="x"),
        tool_turn("edit", old="- 1", new="+ 1"),
        tool_turn("submit"),
    ]
    played = play(CodeRepairEnvironment, task(), turns)
    answers = contents(played)
    assert answers[:2] == ["ok", "error: old text not found"]
    assert answers[2] == "error: old text found 2 times, must be unique"
    assert answers[3].startswith("error: old: ") and answers[4] == "ok"
    assert played.episode.final_state == {"program": "def f(a, b):\n    return a + b + 1\n", "submitted": True}
    failed = [event for event in played.episode.events if event.kind == "edit_failed"]
    assert [(event.turn, event.data["old"]) for event in failed] == [(1, "not there"), (2, "a")]


def test_run_tests_reports_the_current_program(play, trusting_sandbox):
    edit = tool_turn("edit", old="a - b - 1", new="a + b + 1")
    crash = tool_turn("edit", old="return", new="return c +")
    turns = [tool_turn("run_tests"), edit, tool_turn("run_tests"), crash, tool_turn("run_tests")]
    played = play(CodeRepairEnvironment, task(), turns, trusting_sandbox)
    assert contents(played) == [
        "fail: f(3, 4) gives -2, expected 8",
        "ok",
        "pass: f(3, 4)",
        "ok",
        "fail: f(3, 4) ends in exception: NameError: name 'c' is not defined, expected 8",
    ]


def test_run_tests_without_a_sandbox_is_a_fault(play):
    with pytest.raises(EnvironmentFault, match="needs a sandbox"):
        play(CodeRepairEnvironment, task(), [tool_turn("run_tests")])


def test_submit_takes_a_whole_program_only_where_the_task_says_so(play):
    handed_in = play(CodeRepairEnvironment, task(), [tool_turn("submit", code="pass")])
    assert handed_in.episode.final_state == {"program": "pass", "submitted": True}
    refused = play(CodeRepairEnvironment, task(accepts_program=False), [tool_turn("submit", code="pass")])
    assert contents(refused) == ["error: submit takes no code here; use edit"]
    assert refused.episode.final_state == {"program": PROGRAM, "submitted": False}


@pytest.mark.parametrize(
    "code",
    [
        "def f(a, b):\n    return a + b + 1\n",
        "<<<<<<< SEARCH\n    return a - b - 1\n=======\n    return a + b + 1\n>>>>>>> REPLACE\n",
        "@@ -1,2 +1,2 @@\n def f(a, b):\n-    return a - b - 1\n+    return a + b + 1\n",
    ],
)
def test_submit_takes_patches_in_several_forms(play, code):
    played = play(CodeRepairEnvironment, task(), [tool_turn("submit", code=code)])
    assert played.episode.final_state == {"program": "def f(a, b):\n    return a + b + 1\n", "submitted": True}


def test_a_patch_that_does_not_apply_is_told_and_not_handed_in(play):
    code = "<<<<<<< SEARCH\nx\n=======\ny\n>>>>>>> REPLACE\n"
    played = play(CodeRepairEnvironment, task(), [tool_turn("submit", code=code)])
    assert contents(played) == ["error: SEARCH block 1: text not found; nothing was handed in"]
    assert played.episode.final_state == {"program": PROGRAM, "submitted": False}


def test_no_submission_is_recorded_as_such(play):
    turns = [tool_turn("edit", old="a - b", new="a + b")]
    assert play(CodeRepairEnvironment, task(), turns).episode.final_state["submitted"] is False


def test_cases_are_shown_as_source_and_in_a_fixed_order():
    case = {"id": "c", "expression": "f(*args)", "args": ["x", encode_plain((1, 2))], "setup": "import node"}
    case["expected"] = encode_plain({"b", "a", "c"})
    assert expectation(case) == "import node\nf('x', (1, 2)) gives {'a', 'b', 'c'}"
    assert to_case(case).args == ("x", (1, 2))
    assert report(case, CaseResult("c", CaseStatus.TIMEOUT)).endswith("ends in timeout, expected {'a', 'b', 'c'}")


def test_a_wrong_constant_is_easier_than_a_wrong_variable():
    places = {1.0: {4}, 2.0: {1, 3}, 3.0: {0, 2}}
    found = set()
    for made in CodeRepairEnvironment.load_tasks("train", "micro", 40, 0):
        edit = made.privileged.trajectory[0].tool_calls[0].arguments
        pairs = zip(edit["old"].split(), edit["new"].split(), strict=True)
        level = CodeRepairEnvironment.difficulty(made)
        found.add(level)
        assert {index for index, (old, new) in enumerate(pairs) if old != new} <= places[level]
    assert found == {1.0, 2.0, 3.0}
