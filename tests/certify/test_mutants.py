"""Every shipped verifier, broken in ten obvious ways: validation notices each."""

import json
from itertools import count

import pytest

from agentopd.errors import InfraError
from agentopd.registry import verifiers
from agentopd.types import VerdictStatus
from agentopd_verifiers.calls import CallsVerifier
from agentopd_verifiers.code import CodeVerifier
from agentopd_verifiers.judge import Finding
from agentopd_verifiers.math import MathVerifier
from agentopd_verifiers.state import StateVerifier
from agentopd_verifiers.suite import SuiteVerifier

pytestmark = pytest.mark.slow

PASS, FAIL = Finding(1.0, VerdictStatus.OK), Finding(0.0, VerdictStatus.WRONG)
WORLDS = {MathVerifier: ("math", "micro"), CodeVerifier: ("code_repair", "micro"),
          StateVerifier: ("tool_use", "micro"), CallsVerifier: ("tool_use", "bfcl"),
          SuiteVerifier: ("repo_repair", "micro")}  # fmt: skip


async def always_pass(judge, task, episode):
    return PASS


async def always_fail(judge, task, episode):
    return FAIL


async def inverted(judge, task, episode):
    return FAIL if (await judge(task, episode)).outcome else PASS


async def anything_goes(judge, task, episode):
    return PASS if episode.final_text or episode.events else FAIL


async def faults_pass(judge, task, episode):
    try:
        return await judge(task, episode)
    except Exception:
        return PASS


async def faults_fail(judge, task, episode):
    try:
        return await judge(task, episode)
    except Exception:
        return FAIL


async def half_credit(judge, task, episode):
    found = await judge(task, episode)
    return Finding(0.5, VerdictStatus.WRONG) if found.outcome == 0.0 else found


async def never_sure(judge, task, episode):
    return Finding(None, VerdictStatus.AMBIGUOUS)


def flaky():
    calls = count(1)

    async def every_third_time_wrong(judge, task, episode):
        found = await judge(task, episode)
        return found if next(calls) % 3 else await inverted(judge, task, episode)

    return every_third_time_wrong


async def off_by_one(judge, task, episode):
    """Math: a neighbour of the answer will do."""
    answer = int(task.hidden["answer"])
    tried = [await judge(task.model_copy(update={"hidden": {"answer": str(answer + d)}}), episode) for d in (-1, 0, 1)]
    return max(tried, key=lambda found: found.outcome)


async def shown_cases_only(judge, task, episode):
    """Code: what the student could see is all that is run."""
    return await judge(
        task.model_copy(update={"hidden": {**task.hidden, "cases": task.public["public_cases"]}}), episode
    )


async def no_frame_condition(judge, task, episode):
    """State: what else changed does not matter."""
    goal, initial, db = task.hidden["goal"], task.hidden["initial"], episode.final_state["db"]
    return PASS if all(db[key] == goal[key] for key in goal if goal[key] != initial[key]) else FAIL


async def names_only(judge, task, episode):
    """Calls: the right functions with any arguments."""
    wanted = [name for truth in task.hidden["ground_truth"] for name in truth]
    return PASS if wanted == [call.name for turn in episode.turns for call in turn.tool_calls] else FAIL


async def shown_tests_only(judge, task, episode):
    """Suite: what the student could run is all that is run."""
    return await judge(task.model_copy(update={"hidden": {**task.hidden, "tests": task.public["tests"]}}), episode)


GENERAL = (always_pass, always_fail, inverted, anything_goes, faults_pass, faults_fail, half_credit, never_sure)
OWN = {MathVerifier: off_by_one, CodeVerifier: shown_cases_only, StateVerifier: no_frame_condition,
       CallsVerifier: names_only, SuiteVerifier: shown_tests_only}  # fmt: skip


def mutated(verifier, way):
    async def judge(self, task, episode, sandbox):
        return await way(lambda t, e: verifier.judge(self, t, e, sandbox), task, episode)

    name = f"{verifier.__name__}/{way.__name__}"
    verifiers.register(name)(type(f"Mutant{verifier.__name__}", (verifier,), {"judge": judge, "name": name}))
    return name


@pytest.fixture
def bfcl_rows(tmp_path, monkeypatch):
    schema = {"type": "dict", "properties": {"base": {"type": "integer"}}, "required": ["base"]}
    rows = [
        {"id": f"simple_{n}", "category": "simple", "messages": [{"role": "user", "content": f"Area {n}?"}],
         "functions": [{"name": "area", "description": "Area.", "parameters": schema}],
         "ground_truth": [{"area": {"base": [n]}}]}
        for n in range(8)
    ]  # fmt: skip
    (tmp_path / "bfcl_single_turn_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("AGENTOPD_DATA", str(tmp_path))


@pytest.mark.parametrize("verifier", WORLDS, ids=lambda item: item.__name__)
def test_the_verifier_as_it_is_passes(verifier, examine, bfcl_rows):
    env, source = WORLDS[verifier]
    assert examine(env, mutated(verifier, as_it_is), source) is None


async def as_it_is(judge, task, episode):
    return await judge(task, episode)


@pytest.mark.parametrize("verifier", WORLDS, ids=lambda item: item.__name__)
def test_ten_obvious_mutants_are_caught(verifier, examine, bfcl_rows):
    env, source = WORLDS[verifier]
    ways = [*GENERAL, flaky(), OWN[verifier]]
    found = {way.__name__: examine(env, mutated(verifier, way), source) for way in ways}
    assert len(found) == 10
    assert not [name for name, finding in found.items() if finding is None]
    assert found["always_pass"].check == "noop" and found["faults_fail"].check == "faults"


def test_a_verifier_that_scores_sandbox_faults_is_caught(examine):
    async def lenient(judge, task, episode):
        try:
            return await judge(task, episode)
        except InfraError:
            return FAIL

    finding = examine("code_repair", mutated(CodeVerifier, lenient))
    assert finding.check == "faults" and "sandbox that fails" in finding.detail
