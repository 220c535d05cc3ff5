"""A sandbox whose workers are all killed: a training step goes on without verdicts, says so, and moves nothing."""

import asyncio
import os
import signal

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.registry import sandboxes
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train
from agentopd_sandboxes import JailSandbox

REPAIR = (
    '[model]\nstudent = "micro/student"\n[teachers.default]\nmodel = "micro/teacher"\n'
    '[[suite.skills]]\nname = "repair"\nenv = "code_repair"\n'
)


@sandboxes.register("dying")
class DyingSandbox(JailSandbox):
    """A jail that passes its self-test; from the first program on, every worker is killed."""

    dying = False

    async def _spawn(self):
        worker = await super()._spawn()
        if self.dying:
            kill(worker)
        return worker

    async def run_cases(self, program, cases, limits=None):
        self.dying = True
        for worker in self._idle:
            kill(worker)
        return await super().run_cases(program, cases, limits)


def kill(worker):
    os.kill(worker.zygote._keeper.pid, signal.SIGKILL)


@pytest.mark.slow
def test_verdicts_that_a_fault_took_are_masked_and_counted(tmp_path, small):
    path = tmp_path / "repair.toml"
    path.write_text(REPAIR)
    overrides = small("train.steps=1", "objective.preset=grpo", "sandbox.backend=dying", "sandbox.workers=1")
    asyncio.run(train(Run.start(load_run_config(path, overrides)), make_console(plain=True)))
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert (
        6 < row["repair/infra_errors"] == row["batch/unjudged"] <= 12
    )  # a program that is not handed in needs no jail
    assert row["learner/grad_norm"] == 0
