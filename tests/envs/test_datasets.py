"""The public benchmarks: every row loads, is solved by its gold turns and by nothing less."""

import asyncio
import json

import pytest

from agentopd.contracts import Program, SandboxLimits
from agentopd.errors import ConfigError, SandboxError, TaskError
from agentopd.types import Message
from agentopd_envs.cases import report, to_case
from agentopd_envs.code_generation import CodeGenerationEnvironment
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_envs.datasets.bfcl import gold_call, json_schema
from agentopd_envs.datasets.completion import first_statement
from agentopd_envs.datasets.programs import first_change
from agentopd_envs.math import MathEnvironment
from agentopd_envs.tau2_mock import Tau2MockEnvironment
from agentopd_envs.tool_use import ToolUseEnvironment
from agentopd_sandboxes.jail import JailSandbox

ROWS = {
    (MathEnvironment, "gsm8k"): 200,
    (ToolUseEnvironment, "bfcl"): 64,
    (CodeRepairEnvironment, "quixbugs"): 20,
    (CodeRepairEnvironment, "humanevalfix"): 40,
}
sources = pytest.mark.parametrize(("env_class", "source"), list(ROWS), ids=[source for _, source in ROWS])


# --- without the data ------------------------------------------------------------------------------------------------


@sources
def test_a_missing_folder_or_file_says_what_to_set(env_class, source, monkeypatch, tmp_path):
    monkeypatch.delenv("AGENTOPD_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"AGENTOPD_DATA is not set: set it to the folder that holds \w+_dev.jsonl"):
        list(env_class.load_tasks("eval", source, None, 0))
    monkeypatch.setenv("AGENTOPD_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path.name}.* has no {source}"):
        list(env_class.load_tasks("eval", source, None, 0))


def test_a_bad_row_is_named_by_its_line(monkeypatch, tmp_path):
    good = {"id": "a", "question": "1 + 1?", "answer": "It is 1+1=<<1+1=2>>2\n#### 2", "final": "2"}
    file = tmp_path / "gsm8k_dev.jsonl"
    monkeypatch.setenv("AGENTOPD_DATA", str(tmp_path))
    file.write_text(json.dumps(good) + "\n")
    (task,) = MathEnvironment.load_tasks("train", "gsm8k", None, 0)
    assert task.privileged.solution == "It is 1+1=2\n\\boxed{2}"
    file.with_name("gsm8k_dev.jsonl").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "gsm8k_dev.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"id": "b", "question": "?"}) + "\n")
    monkeypatch.setenv("AGENTOPD_DATA", str(other))
    with pytest.raises(TaskError, match="line 2: answer: Field required"):
        list(MathEnvironment.load_tasks("train", "gsm8k", None, 0))


def test_only_a_line_feed_ends_a_row(monkeypatch, tmp_path):
    row = {"id": "a", "question": "1 +\u20281?", "answer": "2\n#### 2", "final": "2"}
    monkeypatch.setenv("AGENTOPD_DATA", str(tmp_path))
    (tmp_path / "gsm8k_dev.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (task,) = MathEnvironment.load_tasks("train", "gsm8k", None, 0)
    assert "1 +\u20281?" in task.prompt[-1].content


def test_bfcl_schemas_become_json_schema():
    theirs = {
        "type": "dict",
        "properties": {
            "point": {"type": "tuple", "items": {"type": "float"}, "description": "where"},
            "extra": {"type": "any"},
            "inner": {"type": "dict", "properties": {"n": {"type": "integer", "optional": True}}},
        },
        "required": ["point"],
        "optional": ["extra"],
    }
    assert json_schema(theirs) == {
        "type": "object",
        "properties": {
            "point": {"type": "array", "items": {"type": "number"}, "description": "where"},
            "extra": {},
            "inner": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": []},
        },
        "required": ["point"],
    }


def test_bfcl_gold_takes_the_first_accepted_values():
    truth = {"a.b": {"n": [1, 2], "day": ["", "Monday"], "d": [{"x": [3], "y": ["", 4]}], "rows": [[{"k": ["v"]}, 5]]}}
    call = gold_call(truth)
    assert (call.name, call.arguments) == ("a.b", {"n": 1, "d": {"x": 3}, "rows": [{"k": "v"}, 5]})


def test_hints_point_without_telling():
    assert first_change("a = 1\nb = 2\n", "a = 1\nb = 3\n") == "The line `b = 2` is wrong."
    assert first_change("a = 1\nc = 3\n", "a = 1\nb = 2\nc = 3\n") == "Something is missing before `c = 3`."
    assert first_change("a = 1\n", "a = 1\nb = 2\n") == "Its end is missing."
    assert first_change("a = 1\n", "a = 1\n") == ""
    program = 'def f(x):\n    """Twice."""\n    y = (x +\n      x)\n    return y\n'
    assert first_statement(program, "f") == "Its body can begin with `y = (x +`."
    assert first_statement(program, "g") == first_statement("def f(:", "f") == ""


# --- with the data ---------------------------------------------------------------------------------------------------


@pytest.mark.data
@sources
def test_every_row_loads_in_an_order_set_by_the_seed(env_class, source, data_dir):
    tasks = list(env_class.load_tasks("eval", source, None, 0))
    assert len({task.id for task in tasks}) == len(tasks) == ROWS[env_class, source]
    assert {task.split for task in tasks} == {"eval"} and {task.env for task in tasks} == {env_class.name}
    assert all(task.source.licence and task.source.row == task.id for task in tasks)
    assert list(env_class.load_tasks("eval", source, 5, 0)) == tasks[:5]
    again = list(env_class.load_tasks("train", source, None, 1))
    assert {task.id for task in again} == {task.id for task in tasks} and again[0].id != tasks[0].id
    assert json.dumps([task.model_dump(mode="json") for task in tasks])


@pytest.mark.data
@pytest.mark.parametrize(
    ("env_class", "source"),
    [
        *ROWS,
        (CodeGenerationEnvironment, "humaneval"),
        (CodeGenerationEnvironment, "mbpp"),
        (Tau2MockEnvironment, "tau2"),
    ],
)
def test_every_row_has_a_hint_for_teachers_that_is_no_news_in_the_prompt(env_class, source, data_dir):
    for task in env_class.load_tasks("train", source, None, 0):
        assert task.privileged.hint and task.privileged.hint not in task.student_view().model_dump_json()


@pytest.mark.data
@pytest.mark.parametrize(("env_class", "source"), [(MathEnvironment, "gsm8k"), (ToolUseEnvironment, "bfcl")])
def test_gold_solves_and_less_does_not(env_class, source, data_dir, outcome):
    for task in env_class.load_tasks("eval", source, None, 0):
        assert outcome(env_class, task, env_class.gold_turns(task)) == 1.0, task.id
        assert outcome(env_class, task, env_class.starter_turns(task)) == 0.0, task.id
        assert outcome(env_class, task, [Message(role="assistant")]) == 0.0, task.id


@pytest.mark.data
def test_bfcl_is_one_turn_of_recorded_calls(data_dir, play):
    tasks = {task.id: task for task in ToolUseEnvironment.load_tasks("eval", "bfcl", None, 0)}
    task = tasks["bfcl_parallel_7"]
    assert [schema.name for schema in ToolUseEnvironment.tool_schemas(task)] == ["math.factorial"]
    (gold,) = ToolUseEnvironment.gold_turns(task)
    played = play(ToolUseEnvironment, task, [gold, gold])
    assert len(played.episode.turns) == 1
    assert [event.data["arguments"] for event in played.episode.events] == [{"number": n} for n in (5, 10, 15)]
    lost = Message(role="assistant", tool_calls=(gold.tool_calls[0].model_copy(update={"name": "factorial"}),))
    (event,) = play(ToolUseEnvironment, task, [lost]).episode.events
    assert not event.data["ok"] and event.data["result"].startswith("error: unknown tool 'factorial'")


@pytest.mark.data
@pytest.mark.parametrize("source", ["quixbugs", "humanevalfix"])
def test_programs_are_shown_with_cases_that_also_judge(source, data_dir):
    for task in CodeRepairEnvironment.load_tasks("eval", source, None, 0):
        shown = task.public["public_cases"]
        assert 1 <= len(shown) <= 2 and len(task.hidden["cases"]) >= 3
        assert task.public["program"].strip() in task.prompt[-1].content
        assert task.hidden["gold"] not in task.prompt[-1].content
        assert task.hidden["starter"] == task.public["program"]


SINGLE_FAILURE = {f"humanevalfix_{number}" for number in (82, 140, 149, 157)}
"""Rows with one failing case, which is held back."""


async def _check_programs(source: str, sandbox: JailSandbox) -> list[str]:
    problems = []
    for task in CodeRepairEnvironment.load_tasks("eval", source, None, 0):
        cases = [*task.hidden["cases"], *task.public["public_cases"]]
        passed = {}
        for which in ("gold", "starter"):
            program = Program(task.hidden[which], task.public["files"])
            results = await sandbox.run_cases(program, [to_case(case) for case in cases], SandboxLimits(wall_s=4.0))
            lines = [report(case, result) for case, result in zip(cases, results, strict=True)]
            passed[which] = [line for line in lines if line.startswith("fail")]
        problems += [f"{task.id}: gold: {line}" for line in passed["gold"]]
        if not passed["starter"]:
            problems.append(f"{task.id}: the buggy program passes")
        shown = [report(case, result) for case, result in zip(cases, results, strict=True)][len(task.hidden["cases"]) :]
        if all(line.startswith("pass") for line in shown) != (task.id in SINGLE_FAILURE):
            problems.append(f"{task.id}: of the cases shown the buggy program fails {shown}")
        if task.id in SINGLE_FAILURE and len(passed["starter"]) != 1:
            problems.append(f"{task.id}: more than one case fails, so one can be shown")
    return problems


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("source", ["quixbugs", "humanevalfix"])
def test_gold_programs_pass_every_case_and_buggy_ones_do_not(source, data_dir):
    async def run():
        sandbox = JailSandbox(workers=2)
        try:
            await sandbox.start()
            return await _check_programs(source, sandbox)
        finally:
            await sandbox.aclose()

    try:
        problems = asyncio.run(run())
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
    assert not problems


@pytest.mark.data
@pytest.mark.slow
def test_handed_in_gold_is_judged_right_by_the_code_verifier(data_dir, outcome):
    task = next(t for t in CodeRepairEnvironment.load_tasks("eval", "quixbugs", None, 0) if "shortest" in t.id)

    def judged(turns):
        return outcome(CodeRepairEnvironment, task, turns, JailSandbox(workers=2))

    try:
        assert judged(CodeRepairEnvironment.gold_turns(task)) == 1.0
        assert judged(CodeRepairEnvironment.starter_turns(task)) == 0.0
        assert judged([Message(role="assistant")]) == 0.0
    except SandboxError as error:
        pytest.skip(f"no sandbox here: {error}")
