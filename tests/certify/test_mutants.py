"""Every shipped verifier, broken in ten obvious ways: validation notices each."""

import json
from functools import partial
from itertools import count

import pytest

from agentopd.errors import InfraError
from agentopd.registry import verifiers
from agentopd.types import VerdictStatus
from agentopd_envs import ToolEnvironment, register_environment, tool, tool_turn
from agentopd_envs.bfcl_multi_turn import BfclMultiTurnVerifier
from agentopd_sandboxes.unsafe import UnsafeSandbox
from agentopd_verifiers.calls import CallsVerifier
from agentopd_verifiers.code import AnySizeCodeVerifier, CodeVerifier
from agentopd_verifiers.command import CommandVerifier
from agentopd_verifiers.judge import Finding
from agentopd_verifiers.math import MathVerifier
from agentopd_verifiers.state import StateVerifier
from agentopd_verifiers.suite import SuiteVerifier

pytestmark = pytest.mark.slow

PASS, FAIL = Finding(1.0, VerdictStatus.OK), Finding(0.0, VerdictStatus.WRONG)
WORLDS = {MathVerifier: ("math", "micro"), CodeVerifier: ("code_repair", "micro"),
          AnySizeCodeVerifier: ("code_repair", "micro"),
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


async def names_only_by_request(judge, task, episode):
    """BFCL multi turn: the right functions for each request, with any arguments."""
    wanted, made = task.hidden["ground_truth"], episode.final_state["calls"]
    names = [[[call["name"] for call in calls] for calls in turns] for turns in (wanted, made[: len(wanted)])]
    return PASS if names[0] == names[1] else FAIL


async def any_exit_code(judge, task, episode):
    """Command: what ran to its end was right."""
    found = await judge(task, episode)
    return PASS if found.detail.startswith("exit code") else found


GENERAL = (always_pass, always_fail, inverted, anything_goes, faults_pass, faults_fail, half_credit, never_sure)
OWN = {MathVerifier: off_by_one, CodeVerifier: shown_cases_only, AnySizeCodeVerifier: shown_cases_only,
       StateVerifier: no_frame_condition,
       CallsVerifier: names_only, SuiteVerifier: shown_tests_only, BfclMultiTurnVerifier: names_only_by_request,
       CommandVerifier: any_exit_code}  # fmt: skip


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


async def as_it_is(judge, task, episode):
    return await judge(task, episode)


def examine_mutants(examine, verifier, env, source="micro", **kwargs):
    """The verifier as it is passes every check; each of ten mutants fails one."""
    assert examine(env, mutated(verifier, as_it_is), source, **kwargs) is None
    ways = [*GENERAL, flaky(), OWN[verifier]]
    found = {way.__name__: examine(env, mutated(verifier, way), source, **kwargs) for way in ways}
    assert len(found) == 10
    assert not [name for name, finding in found.items() if finding is None]
    assert found["always_pass"].check == "noop" and found["faults_fail"].check == "faults"


@pytest.mark.parametrize("verifier", WORLDS, ids=lambda item: item.__name__)
def test_ten_obvious_mutants_are_caught(verifier, examine, bfcl_rows):
    examine_mutants(examine, verifier, *WORLDS[verifier])


@pytest.mark.data
def test_ten_mutants_of_bfcl_multi_turn_are_caught(examine, data_dir):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is not installed: pip install --no-deps bfcl-eval")
    examine_mutants(examine, BfclMultiTurnVerifier, "bfcl_multi_turn", "bfcl", num=2)


@register_environment("adding")
class Adding(ToolEnvironment):
    """A program to hand in, and a script whose exit code judges it."""

    verifier = "command"

    @classmethod
    def generate(cls, rng):
        n = rng.randrange(100, 999)
        check = f"import sys\nfrom solution import f\nsys.exit(f(1) != {n + 1})"
        judging = {"trust": "low", "command": ["check.py"], "target": "solution.py", "files": {"check.py": check}}
        gold = [tool_turn("submit", program=f"def f(x): return x + {n}")]
        return cls.new_task(f"Write f(x) that adds {n}.", hidden=judging, gold=gold)

    def setup(self):
        self.program, self.submitted = "", False

    @tool(mutates=True)
    def submit(self, program: str):
        """Hand in."""
        self.program, self.submitted = program, True
        self.finish()


def test_ten_mutants_of_the_command_verifier_are_caught(examine):
    examine_mutants(examine, CommandVerifier, "adding", num=2, sandbox=partial(UnsafeSandbox, workers=1))


def test_a_verifier_that_scores_sandbox_faults_is_caught(examine):
    async def lenient(judge, task, episode):
        try:
            return await judge(task, episode)
        except InfraError:
            return FAIL

    finding = examine("code_repair", mutated(CodeVerifier, lenient))
    assert finding.check == "faults" and "sandbox that fails" in finding.detail
