"""The code verifier on every row of the program benchmarks: right passes, broken fails, in any order."""

import asyncio
import json
import random

import pytest

from agentopd.contracts import SandboxLimits
from agentopd.errors import SandboxError
from agentopd.types import Message, Task
from agentopd_envs import tool_turn
from agentopd_envs.code_repair import CodeRepairEnvironment
from agentopd_envs.datasets.lifting import lift
from agentopd_sandboxes.jail import JailSandbox
from agentopd_verifiers.code import CodeVerifier

pytestmark = [pytest.mark.data, pytest.mark.slow]
LIMITS = SandboxLimits(wall_s=60.0, cpu_s=2.0)
"""CPU time decides, so that a busy machine changes nothing."""


def humaneval(seed, data_dir):
    """HumanEval as repair: the program to start from has an empty body."""
    rows = [json.loads(line) for line in (data_dir / "humaneval_dev.jsonl").read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    for row in rows:
        starter = row["prompt"] + "    pass\n"
        yield Task(
            id=row["id"],
            env="code_repair",
            prompt=(Message(role="user", content=row["prompt"]),),
            public={"program": starter, "files": {}, "public_cases": []},
            hidden={
                "cases": lift(row["test"], row["entry_point"]),
                "starter": starter,
                "gold": row["prompt"] + row["canonical_solution"],
            },
            seed=seed,
        )


def tasks(source, seed, data_dir):
    if source == "humaneval":
        return humaneval(seed, data_dir)
    return CodeRepairEnvironment.load_tasks("eval", source, None, seed)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.parametrize(("source", "rows"), [("quixbugs", 20), ("humanevalfix", 40), ("humaneval", 40)])
def test_right_passes_and_broken_fails(source, rows, seed, data_dir, act):
    """The seed shuffles the rows and, through the task's hash, the order of cases in each run."""

    async def run():
        sandbox, verifier, found = JailSandbox(workers=2), CodeVerifier(LIMITS), {}
        await sandbox.start()
        try:
            for task in tasks(source, seed, data_dir):
                found[task.id] = [await verifier.verify(task, item, sandbox) for item in submissions[task.id]]
        finally:
            await sandbox.aclose()
        return found

    submissions = {}
    for task in tasks(source, seed, data_dir):
        turns = ([tool_turn("submit", code=task.hidden["gold"])], [tool_turn("submit")])
        submissions[task.id] = [act(CodeRepairEnvironment, task, script) for script in turns]
    try:
        found = asyncio.run(run())
    except SandboxError as exc:
        pytest.skip(f"no namespace jail on this machine: {exc}")
    assert len(found) == rows
    outcomes = {key: [verdict.outcome for verdict in pair] for key, pair in found.items()}
    assert {key: pair for key, pair in outcomes.items() if pair != [1.0, 0.0]} == {}
    assert all(right.reward == 1.0 and broken.reward == 0.0 for right, broken in found.values())
