"""BFCL multi turn: the leaderboard's classes in the sandbox, its states turn by turn, its rules."""

import asyncio
import json
import subprocess
import sys

import pytest

from agentopd.errors import SandboxError, TaskError
from agentopd.types import Message, ToolCall
from agentopd_envs import tool_turn
from agentopd_envs.bfcl_multi_turn import BfclMultiTurnEnvironment, BfclMultiTurnVerifier, play_calls
from agentopd_envs.datasets.bfcl_multi_turn import parse_call
from agentopd_sandboxes.jail import JailSandbox

LIBRARIES = BfclMultiTurnEnvironment.libraries
SOME = 7
DONE = Message(role="assistant", content="Done.")


def test_calls_are_read_as_literals_and_never_evaluated():
    names = {"sort": ["file_name"], "f": ["a", "b"]}
    assert parse_call("sort('x.pdf')", names) == ToolCall(name="sort", arguments={"file_name": "x.pdf"})
    assert parse_call("f([1, -2.5], b={'k': None})", names).arguments == {"a": [1, -2.5], "b": {"k": None}}
    for text in ("f(a=__import__('os'))", "f(a=open('x'))"):
        with pytest.raises(TaskError, match="malformed"):
            parse_call(text, names)
    with pytest.raises(TaskError, match="is not a call"):
        parse_call("a.b(1)", names)


@pytest.fixture
def tasks(data_dir):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed: pip install --no-deps bfcl-eval")
    return list(BfclMultiTurnEnvironment.load_tasks("eval", "bfcl", None, 0))


LEADERBOARD = '''
import json, sys
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call

def told(value):
    """As the data set writes a state: attributes that are public, a directory's way to its parent left out."""
    if isinstance(value, dict):
        return {str(key): told(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [told(item) for item in value]
    if type(value).__name__ in ("Directory", "File"):
        public = {key: item for key, item in vars(value).items() if key[0] != "_" and key != "parent"}
        return {"__repr__": type(value).__name__, **told(public)}
    return str(value) if isinstance(value, set) else value

for row in map(json.loads, sys.stdin):
    played = []
    for calls in row["ground_truth"]:
        where = row["initial_config"], row["involved_classes"], "gold", row["id"]
        results, apis = execute_multi_turn_func_call(calls, *where)
        public = {name: {key: item for key, item in vars(api).items() if key[0] != "_"} for name, api in apis.items()}
        played.append({"results": results, "state": told(public)})
    print(json.dumps(played))
'''
"""Plays the rows' texts by the leaderboard's own dispatcher, on objects that live from turn to turn."""


@pytest.mark.data
@pytest.mark.slow
def test_states_and_results_equal_the_leaderboards_turn_by_turn(tasks, data_dir):
    text = (data_dir / "bfcl_multi_turn_dev.jsonl").read_text()
    rows = {row["id"]: row for row in map(json.loads, text.splitlines())}
    command = [sys.executable, "-W", "ignore", "-c", LEADERBOARD]
    told = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    theirs = dict(zip(rows, map(json.loads, told), strict=True))

    async def play_all():
        sandbox = JailSandbox(workers=2, libraries=LIBRARIES)
        try:
            await sandbox.start()
            return {task.id: await play_calls(sandbox, task, gold_calls(task)) for task in tasks}
        except SandboxError as error:
            pytest.skip(f"no sandbox here: {error}")
        finally:
            await sandbox.aclose()

    played = asyncio.run(play_all())
    assert len(played) == len(rows) == 20 and sum(map(len, played.values())) == 70
    for task_id, turns in played.items():
        row = rows[task_id]
        ours = [{"results": [text for _, text in turn["results"]], "state": turn["state"]} for turn in turns]
        assert ours == theirs[task_id]
        assert [turn["results"] for turn in ours] == row["ground_truth_results"]
        assert ours[-1]["state"] == row["final_state"]


def gold_calls(task):
    return [[ToolCall.model_validate(call) for call in calls] for calls in task.hidden["ground_truth"]]


@pytest.mark.data
@pytest.mark.slow
def test_gold_solves_every_row_and_less_does_not(tasks, outcomes):
    env_class = BfclMultiTurnEnvironment
    assert set(outcomes(env_class, tasks, env_class.gold_turns, LIBRARIES).values()) == {1.0}
    for less in (lambda task: [Message(role="assistant")], env_class.starter_turns):
        assert set(outcomes(env_class, tasks[:SOME], less, LIBRARIES).values()) == {0.0}
    for index in range(2):
        wrong = outcomes(env_class, tasks[:SOME], lambda task, i=index: env_class.wrong_turns(task)[i], LIBRARIES)
        assert set(wrong.values()) == {0.0}


@pytest.mark.data
def test_a_call_for_a_later_request_comes_too_early(tasks, outcomes):
    """All the right calls, in the first turn: the state after the first request is not the one that was asked for."""
    task = next(task for task in tasks if task.id == "bfcl_multi_turn_base_0")
    calls = [call for turn in gold_calls(task) for call in turn]
    hasty = [Message(role="assistant", tool_calls=tuple(calls)), *([DONE] * len(task.hidden["ground_truth"]))]
    found = outcomes(BfclMultiTurnEnvironment, [task], lambda task: hasty, LIBRARIES)
    assert found == {task.id: 0.0}


@pytest.mark.data
def test_the_user_speaks_by_the_script_and_mistakes_are_shown(tasks, play):
    task = next(task for task in tasks if task.id == "bfcl_multi_turn_base_0")
    sandbox = JailSandbox(workers=1, libraries=LIBRARIES)
    turns = [tool_turn("ls"), tool_turn("nonsense"), tool_turn("cd", wrong=1), DONE, DONE]
    try:
        seen = [message.content for message in play(BfclMultiTurnEnvironment, task, turns, sandbox).seen]
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    finally:
        asyncio.run(sandbox.aclose())
    user = task.public["user_turns"]
    assert json.loads(seen[1]) == {"current_directory_content": ["document", "archive"]}
    assert seen[2].startswith("error: unknown tool 'nonsense'")
    assert seen[3].startswith("error: Error during execution: ") and "wrong" in seen[3]
    assert seen[4:] == user[:2]


@pytest.mark.data
def test_another_version_of_the_classes_is_the_tasks_fault(tasks, play):
    task = tasks[0].model_copy(update={"hidden": {**tasks[0].hidden, "results": "0" * 64}})

    async def judge():
        sandbox = JailSandbox(workers=1, libraries=LIBRARIES)
        try:
            await sandbox.start()
            return await BfclMultiTurnVerifier().verify(task, played.episode, sandbox)
        finally:
            await sandbox.aclose()

    played = play(BfclMultiTurnEnvironment, task, [DONE] * 9)
    try:
        verdict = asyncio.run(judge())
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    assert verdict.outcome is None and "install another version" in verdict.detail
