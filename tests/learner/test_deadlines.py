"""Ranks wait for one another as long as the config says, in every group, and then say so."""

import json
import subprocess
import sys

import pytest

from agentopd.config import load_run_config
from agentopd.errors import ConfigError
from agentopd.learner import runtime
from agentopd.runs import Run
from tests.scaleout.conftest import ROOT
from tests.scaleout.test_launchers import environment, free_port

QUICKSTART = ROOT / "configs/quickstart.toml"
SERVED = 'teachers.default={kind="served", base_url="http://there:8100"}'

RANK = """
import json, os, sys
import deepspeed, torch
import torch.distributed as dist
from agentopd.errors import InfraError
from agentopd.learner import runtime

print("imported", flush=True)
sys.stdin.readline()
runtime.start(5.0)
later = dist.new_group()  # as DeepSpeed makes its own
runtime.barrier()
if runtime.rank():
    sys.stdin.read()  # the other one waits in vain
else:
    every = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    seconds = [backend.options._timeout.total_seconds() for backend in every]
    try:
        {collective}
    except InfraError as error:
        print(json.dumps([seconds, str(error)]), flush=True)
os._exit(0)
"""


def ranks(program):
    """Two processes that find one another once both have imported everything."""
    where = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env={**where, "RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]
    for process in both:
        while "imported" not in process.stdout.readline():
            assert process.poll() is None
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    return both


def test_the_runs_deadline_holds_from_the_first_word_between_ranks(tmp_path, monkeypatch):
    """Engines that ranks share talk before the learner is there."""

    class Begun(Exception):
        pass

    def start(deadline_s: float) -> None:
        raise Begun(deadline_s)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runtime, "start", start)
    monkeypatch.setattr("agentopd.runs.build_policy", lambda *given: pytest.fail("the policy came first"))
    with pytest.raises(Begun, match="5000"):
        Run.start(load_run_config(QUICKSTART, ["learner.collective_timeout_s=5000", f"run_dir={tmp_path / 'run'}"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "collective",
    [
        "runtime.gather_objects(1)",
        "with runtime.waiting_for_ranks(): dist.all_reduce(torch.ones(1), group=later)",
    ],
)
def test_a_rank_that_stays_away_is_waited_for_so_long_and_named(collective):
    waiting, away = ranks(RANK.format(collective=collective))
    try:
        seconds, error = json.loads(waiting.stdout.readline())
    finally:
        for process in (waiting, away):
            process.kill()
            process.communicate()
    assert seconds == [5.0, 5.0]
    assert error.startswith("rank 0 waited 5 s (learner.collective_timeout_s) for a rank that hangs or never started")
    assert "read the output of the others" in error


@pytest.mark.parametrize(
    ("overrides", "waits", "keys"),
    [
        ((SERVED,), 1920, "teachers.default.outage_s + teachers.default.timeout_s"),
        (
            ("rollout.engine=vllm_servers",),
            3000,
            "rollout.servers.outage_s + rollout.servers.turn_timeout_s + rollout.vllm.timeout_s",
        ),
        (("ray.verification_workers=1",), 1800, "ray.attempts x ray.deadline_s"),
    ],
)
def test_ranks_wait_longer_for_one_another_than_for_anything_else(overrides, waits, keys):
    overrides = ("objective.preset=topk_opd", *overrides)
    assert load_run_config(QUICKSTART, [*overrides, f"learner.collective_timeout_s={waits + 1}"])
    with pytest.raises(ConfigError) as found:
        load_run_config(QUICKSTART, [*overrides, f"learner.collective_timeout_s={waits}"])
    assert f"learner.collective_timeout_s is {waits}, and a rank may wait {waits} s" in str(found.value)
    assert f"({keys})" in str(found.value)
