"""Repositories with a bug: the tools, the suite verifier, and every bug that is generated."""

import asyncio

import pytest

from agentopd.contracts import CaseResult, CaseStatus
from agentopd.types import VerdictStatus
from agentopd_envs import tool_turn
from agentopd_envs.micro import repositories
from agentopd_envs.repo_repair import RepoRepairEnvironment, RepositoryRow
from agentopd_sandboxes.suites import LIBRARIES
from agentopd_verifiers.suite import SuiteVerifier, progress

FIRST = next(iter(RepoRepairEnvironment.load_tasks("train", "micro", 1, 0)))
CORE = FIRST.public["editable"][0]


class Results:
    """A sandbox in which the tests of ``passing`` pass; canaries never do."""

    name, capabilities = "results", frozenset()

    def __init__(self, *passing, status=CaseStatus.VALUE):
        self.passing, self.status, self.programs = passing, status, []

    async def run_cases(self, program, cases, limits=None):
        self.programs.append(program)
        return [self._result(case.id) for case in cases]

    def _result(self, node):
        held = any(node.endswith(name) for name in self.passing)
        value = [(node, when, "passed") for when in ("setup", "call", "teardown")] if held else []
        return CaseResult(node, self.status, value)


@pytest.fixture
def use(play):
    """``use(tool, sandbox=None, **arguments)``: what the student is shown."""

    def call(name, sandbox=None, **arguments):
        return play(RepoRepairEnvironment, FIRST, [tool_turn(name, **arguments)], sandbox).seen[-1].content

    return call


def test_the_repository_can_be_read_and_searched(use):
    listed = use("list_files").splitlines()
    assert f"{CORE} *" in listed and len(listed) == 4 and not [line for line in listed if "_more" in line]
    assert use("read_file", path=CORE) == FIRST.public["files"][CORE].rstrip("\n")
    assert use("read_file", path=CORE, start=9).splitlines()[0] == FIRST.public["files"][CORE].splitlines()[8]
    assert f"{CORE}:1: " in use("search", text='"""')
    assert use("search", text="no such text") == "nothing found"
    assert use("read_file", path="../etc/passwd").startswith("error: no file")


def test_only_declared_files_can_be_edited_and_only_one_place_at_a_time(use):
    tests = FIRST.public["tests"][0].partition("::")[0]
    assert use("edit", path=tests, old="assert", new="assert True or").startswith(f"error: {tests} cannot be edited")
    assert "found 0 times" in use("edit", path=CORE, old="no such text", new="x")
    assert use("edit", path=CORE, old=FIRST.public["files"][CORE].splitlines()[0], new="#") == "ok"


def test_the_tests_that_are_shown_can_be_run(use):
    sandbox = Results("::test_0")
    (node,) = FIRST.public["tests"]
    assert use("run_tests", sandbox) == f"pass: {node}"
    assert use("run_tests", Results()) == f"FAIL: {node}"
    assert not [name for name in sandbox.programs[0].files if "_more" in name]


def judged(play, turns, sandbox, task=FIRST):
    episode = play(RepoRepairEnvironment, task, turns, sandbox).episode
    return asyncio.run(SuiteVerifier().verify(task, episode, sandbox))


def test_every_test_has_to_pass_and_a_failing_one_leaves_its_share_of_progress(play):
    gold = RepoRepairEnvironment.gold_turns(FIRST)
    everything = [f"::test_{index}" for index in range(9)]
    verdict = judged(play, gold, Results(*everything))
    assert (verdict.outcome, verdict.reward, verdict.provenance["trust"]) == (1.0, 1.0, "medium")
    assert verdict.components["penalty"] == 0.0 and verdict.components["diff_lines"] > 0
    partly = judged(play, gold, Results("::test_1"))
    assert partly.outcome == 0.0 and partly.detail.startswith("1 of ") and partly.reward == 0.0
    assert judged(play, [tool_turn("list_files")], Results(*everything)).status is VerdictStatus.NO_ANSWER
    assert judged(play, gold, Results(status=CaseStatus.TIMEOUT)).status is VerdictStatus.TIMEOUT


def test_progress_by_hand():
    before = {"a": False, "b": False, "c": True, "d": True}
    assert progress(before, {"a": True, "b": True, "c": True, "d": True}) == 1.0
    assert progress(before, {"a": True, "b": False, "c": True, "d": True}) == 0.5
    assert progress(before, {"a": True, "b": False, "c": False, "d": True}) == 0.0


def test_a_task_without_its_hidden_tests_is_not_scored(play):
    bare = FIRST.model_copy(update={"hidden": {}})
    verdict = judged(play, RepoRepairEnvironment.gold_turns(FIRST), Results(), bare)
    assert verdict.status is VerdictStatus.TASK_ERROR
    strange = FIRST.model_copy(update={"hidden": {**FIRST.hidden, "gold": {"setup.py": ""}}})
    assert judged(play, RepoRepairEnvironment.gold_turns(FIRST), Results(), strange).status is VerdictStatus.TASK_ERROR


def test_rows_of_a_data_set_become_repositories():
    row = RepositoryRow(
        problem="Broken.",
        files={"lib.py": "x = 1\n", "test_a.py": "def test_x(): ...\n"},
        editable=["lib.py"],
        tests=["test_a.py::test_x"],
        hidden_files={"test_b.py": "def test_y(): ...\n"},
        hidden_tests=["test_b.py::test_y"],
        gold={"lib.py": "x = 2\n"},
    )
    task = RepoRepairEnvironment.from_row(row)
    assert task.hidden["gold"] == {"lib.py": "x = 2\n"} and "test_b.py" not in str(task.student_view())
    assert [turn.tool_calls[0].name for turn in task.privileged.trajectory] == ["edit", "submit"]


def every_bug():
    for template, made in enumerate(repositories._TEMPLATES):
        for bug in range(len(made.bugs)):
            problem = repositories.Problem(template, bug, "depot", (33, 7))
            yield repositories._task(problem, f"{template}/{bug}", "train", 0)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_every_bug_is_repaired_by_gold_alone(stride, outcomes):
    env_class, tasks = RepoRepairEnvironment, list(every_bug())[::stride]
    assert set(outcomes(env_class, tasks, env_class.gold_turns, LIBRARIES).values()) == {1.0}
    assert set(outcomes(env_class, tasks, env_class.starter_turns, LIBRARIES).values()) == {0.0}


@pytest.mark.slow
def test_attacks_on_the_tests_do_not_pass(outcomes):
    for index in range(4):
        pick = lambda task, i=index: list(RepoRepairEnvironment.wrong_turns(task))[i]  # noqa: E731
        assert set(outcomes(RepoRepairEnvironment, [FIRST], pick, LIBRARIES).values()) == {0.0}
