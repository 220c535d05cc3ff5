"""tau2's mock domain: its rows, judged by the board they leave behind."""

import asyncio
import json

import pytest

from agentopd.certify import skill_of, validate
from agentopd.errors import TaskError
from agentopd.types import Message
from agentopd_envs import tool_turn
from agentopd_envs.tau2_mock import DONE, Check, Tau2MockEnvironment, _fulfilling

pytestmark = pytest.mark.data


@pytest.fixture
def tasks(data_dir):
    return {task.source.row: task for task in Tau2MockEnvironment.load_tasks("eval", "tau2", None, 0)}


def test_gold_solves_every_row_and_nothing_solves_none(tasks, data_dir, outcome):
    rows = [json.loads(line) for line in (data_dir / "tau2_mock/tasks.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} - set(tasks) == {"create_task_1_nl_eval"} and len(tasks) == 9
    for task in tasks.values():
        assert outcome(Tau2MockEnvironment, task, task.privileged.trajectory) == 1.0
        for turns in ([Message(role="assistant")], Tau2MockEnvironment.starter_turns(task),
                      *Tau2MockEnvironment.wrong_turns(task)):  # fmt: skip
            assert outcome(Tau2MockEnvironment, task, turns) == 0.0


def test_what_a_conversation_did_before_is_on_the_board(tasks, play):
    task = tasks["update_task_with_message_history"]
    assert [message.role for message in task.prompt] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert task.prompt[2].tool_calls[0].name == "create_task"
    assert task.public["db"]["tasks"]["task_2"]["title"] == "Project Review"
    seen = play(Tau2MockEnvironment, task, [tool_turn("update_task_status", task_id="task_9", status="pending"), DONE])
    assert seen.seen[-1].content == "error: Task task_9 not found"


def test_the_user_dismisses_what_is_done_and_nothing_else(tasks, play):
    task = tasks["update_task_with_user_tools"]
    for turns, status in ((task.privileged.trajectory, "read"), ([DONE], "unread")):
        left = play(Tau2MockEnvironment, task, turns).episode.final_state["db"]
        assert left["notifications"]["notif_1"]["status"] == status


def test_an_assertion_that_no_call_is_known_for_is_an_error():
    with pytest.raises(TaskError, match="assert_weather"):
        _fulfilling(Check(env_type="assistant", func_name="assert_weather", arguments={}))


def test_it_is_certified(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path))
    certificate = asyncio.run(validate(skill_of("tau2_mock")))
    assert certificate.passed, certificate.findings
