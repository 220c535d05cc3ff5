"""Without a gold patch, passing patches of a group are measured against the smallest of them."""

import pytest

from agentopd.build import Judge, Skill
from agentopd.config.suite import SkillConfig
from agentopd.contracts import GroupVerifier
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_verifiers.code import AnySizeCodeVerifier, CodeVerifier

STARTER = "def f(x, y):\n    return x + y\n"
SMALL = STARTER.replace("x + y", "x * y")
LARGE = "".join(f"a{i} = {i} + {i}\n" for i in range(12)) + SMALL
CASES = [{"id": "two", "expression": "f(2, 3)", "expected": 6}]


@pytest.fixture
def task(make_task):
    return make_task({"cases": CASES, "starter": STARTER, "budget": 100}, {"program": STARTER, "files": {}})


@pytest.fixture
def verdicts(task, make_episode, judge, process_sandbox):
    def of(verifier, *programs):
        episodes = [make_episode(final_state={"program": program, "submitted": True}) for program in programs]
        return [judge(verifier, task, episode, process_sandbox) for episode in episodes]

    return of


def test_the_smallest_passing_patch_of_the_group_is_the_measure(task, verdicts):
    verifier = CodeVerifier()
    alone = verdicts(verifier, SMALL, LARGE, STARTER)
    assert [verdict.reward for verdict in alone] == [1.0, 1.0, 0.0]  # the budget is ample
    small, large, failed = verifier.compare(task, alone)
    # d0 = 2 lines; the large patch has 14: size = min(1, 12 / 4), and nothing else to pay for.
    assert (small.reward, failed.reward) == (1.0, 0.0) and large.reward == pytest.approx(0.7)
    assert large.components["diff_free"] == small.components["diff_cost"] == 2.0
    assert large.provenance["diff_reference"] == "sibling" and "diff_reference" not in failed.provenance
    assert [verdict.outcome for verdict in (small, large, failed)] == [1.0, 1.0, 0.0]


def test_a_kept_verdict_stands_for_its_group(task, verdicts):
    verifier = CodeVerifier()
    _, kept = verifier.compare(task, verdicts(verifier, SMALL, LARGE))
    (again,) = verdicts(CodeVerifier(), LARGE)
    assert again.reward != kept.reward
    assert verifier.compare(task, [again, kept])[0] == kept


def test_gold_is_the_measure_where_it_is_known(task, verdicts):
    verifier = CodeVerifier()
    known = task.model_copy(update={"hidden": {**task.hidden, "gold": SMALL}})
    alone = verdicts(verifier, SMALL, LARGE)
    assert verifier.compare(known, alone) == alone
    nobody = verdicts(verifier, STARTER)
    assert verifier.compare(task, nobody) == nobody


def test_size_may_be_free_and_is_still_measured(task, verdicts):
    verifier = AnySizeCodeVerifier()
    priced = task.model_copy(update={"hidden": {**task.hidden, "gold": SMALL}})
    (verdict,) = verdicts(verifier, LARGE)
    assert verdict.reward == 1.0 and verdict.components["diff_cost"] == 14.0
    assert verifier.compare(priced, [verdict]) == [verdict] and verdict.provenance["verifier"] == "code_any_size@2"


def test_groups_are_compared_apart(task, verdicts, make_episode):
    judge = Judge([Skill(SkillConfig(name="repair", env="code_repair"), CodeRepairEnvironment)], sandbox=None)
    assert isinstance(judge.verifier("repair", task), GroupVerifier)
    found = verdicts(CodeVerifier(), SMALL, LARGE, LARGE)
    update = {"skill": "repair", "task_hash": task.hash}
    episodes = [make_episode().model_copy(update={**update, "group_id": group}) for group in ("a", "a", "b")]
    rewards = [x.reward for x in judge.compare(list(zip(episodes, found, strict=True)), {task.hash: task})]
    assert rewards == [1.0, pytest.approx(0.7), 1.0]
