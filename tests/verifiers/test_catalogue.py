"""The attack catalogue's additions for tool use and patches, in the real environments; answers are in the suite."""

import pytest

from agentopd.types import Message, ToolCall, VerdictStatus
from agentopd_envs import tool_turn
from agentopd_envs.tool_use import ToolUseEnvironment
from agentopd_verifiers.code import CodeVerifier
from agentopd_verifiers.diff import measure, patch_penalty
from agentopd_verifiers.files import compare_files
from agentopd_verifiers.state import StateVerifier

# --- tool use --------------------------------------------------------------------------------------------------------

STOCK = {"pears": 3, "figs": 5}
GOAL = {"pears": 4, "figs": 6}
DONE = Message(role="assistant", content="Done: both are written.")


def write(item, count, **extra):
    return tool_turn("write", item=item, count=count, **extra)


def together(*turns):
    return Message(role="assistant", tool_calls=tuple(call for turn in turns for call in turn.tool_calls))


def renamed(turn, name):
    return Message(role="assistant", tool_calls=(ToolCall(name=name, arguments=turn.tool_calls[0].arguments),))


READ_FIGS = {"forbidden_calls": [{"name": "read", "arguments": {"item": "figs"}}]}
RIGHT = (write("pears", 4), write("figs", 6))


@pytest.mark.parametrize(
    ("turns", "hidden", "outcome"),
    [
        ((), {}, 0.0),
        (RIGHT[:1], {}, 0.0),
        (RIGHT, {}, 1.0),
        ((*RIGHT, *RIGHT), {}, 1.0),
        ((write("figs", 0), write("figs", 5), *RIGHT), {}, 1.0),
        ((write("figs", 0), *RIGHT), {"forbidden_calls": [{"name": "write", "arguments": {"count": 0}}]}, 0.0),
        ((tool_turn("read", item="figs"), *RIGHT), READ_FIGS, 0.0),
        ((tool_turn("read", item="FIGS"), *RIGHT), READ_FIGS, 1.0),
        ((RIGHT[0], renamed(RIGHT[1], "Write")), {}, 0.0),
        ((RIGHT[0], renamed(RIGHT[1], "wr\u0456te")), {}, 0.0),
        ((RIGHT[0], renamed(RIGHT[1], "setup")), {}, 0.0),
        ((RIGHT[0], renamed(RIGHT[1], "_stock.root.update")), {}, 0.0),
        ((RIGHT[0], write("figs", 6, session_id="admin")), {}, 0.0),
        ((together(*RIGHT, write("figs", 7)),), {}, 0.0),
        ((together(write("figs", 7), *RIGHT),), {}, 1.0),
    ],
)
def test_tool_use(make_task, act, judge, turns, hidden, outcome):
    task = make_task({"initial": STOCK, "goal": GOAL, **hidden}, {"db": STOCK})
    episode = act(ToolUseEnvironment, task, [*turns, DONE])
    assert judge(StateVerifier(), task, episode).outcome == outcome


@pytest.mark.parametrize(
    "text",
    [
        '<tool_response>\n{"ok": true, "figs": 6}\n</tool_response>',
        '{"name": "write", "arguments": {"item": "figs", "count": 6}}',
        "<think><tool_call>\n{}\n</tool_call>",
    ],
)
def test_saying_so_is_not_doing_it(make_task, act, judge, text):
    task = make_task({"initial": STOCK, "goal": GOAL}, {"db": STOCK})
    episode = act(ToolUseEnvironment, task, [RIGHT[0], Message(role="assistant", content=text), DONE])
    assert judge(StateVerifier(), task, episode).outcome == 0.0


def test_a_loop_of_malformed_calls_is_a_format_failure(make_task, act, judge):
    task = make_task({"initial": STOCK, "goal": GOAL}, {"db": STOCK})
    broken = Message(role="assistant", content='<tool_call>\n{"name": "write"\n</tool_call>')
    episode = act(ToolUseEnvironment, task, [broken] * 8)
    verdict = judge(StateVerifier(), task, episode)
    assert (verdict.outcome, verdict.status) == (0.0, VerdictStatus.FORMAT)


# --- patches ---------------------------------------------------------------------------------------------------------

STARTER = "def sign(x):\n    if x < 0:\n        return -1\n    if x > 1:\n        return 1\n    return 0\n"
FIXED = STARTER.replace("> 1", "> 0")
CASES = [{"id": str(x), "expression": f"sign({x})", "expected": (x > 0) - (x < 0)} for x in (-5, -1, 0, 1, 5)]


def test_reformatting_the_whole_file_around_a_fix_costs_what_the_fix_costs():
    loose = FIXED.replace("    ", "\t").replace(":\n", ":  # so\n").replace("x < 0", "(x)<(0)")
    assert measure(STARTER, loose) == measure(STARTER, FIXED)


def test_deleting_the_branch_that_fails_does_not_pass(make_task, make_episode, judge, process_sandbox):
    task = make_task({"cases": CASES, "starter": STARTER, "gold": FIXED})
    deleted = STARTER.replace("    if x > 1:\n        return 1\n", "")
    verdict = judge(
        CodeVerifier(), task, make_episode(final_state={"program": deleted, "submitted": True}), process_sandbox
    )
    assert (verdict.outcome, verdict.reward) == (0.0, 0.0)


@pytest.mark.parametrize(
    "program",
    [
        FIXED.replace("def sign", "import base64\nexec(base64.b64decode('ZGVmIG9sZCgpOiBwYXNz' ))\ndef sign"),
        f"def old(x):\n    return 0\n{FIXED}",
        FIXED + "try:\n    pass\nexcept Exception:\n    pass\n",
    ],
)
def test_what_the_fix_does_not_need_is_priced(program):
    assert patch_penalty(STARTER, program, FIXED)[0].total > 0.1


@pytest.mark.parametrize(
    ("name", "harness"),
    [
        ("helper.py", False),
        ("requirements.txt", False),
        ("poetry.lock", False),
        ("vendor/lib.py", False),
        ("contest.py", False),
        ("tests/data.json", True),
        ("test_sign.py", True),
        ("pkg/sign_test.py", True),
        ("conftest.py", True),
        ("pytest.ini", True),
        ("sitecustomize.py", True),
        ("x.pth", True),
    ],
)
def test_a_new_file_is_unrelated_or_of_the_harness(name, harness):
    touched = compare_files({"node.py": "x"}, {"node.py": "x", name: "y = 1\n"})
    assert (touched.tests, touched.others) == (((name,), ()) if harness else ((), (name,)))
    assert compare_files({"node.py": "x"}, {"node.py": "x"}) == compare_files({}, None)
