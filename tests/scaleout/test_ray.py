"""Workers on other nodes: the results of this process, and none lost with a node that dies."""

import asyncio
import time

import pytest
import torch

from agentopd.build import Judge, build_engine, build_sandbox
from agentopd.config import load_run_config
from agentopd.config.run import RolloutConfig, SandboxConfig
from agentopd.config.scaleout import RayConfig
from agentopd.console import make_console
from agentopd.contracts import Case, GenerationRequest, Program, SamplingParams
from agentopd.evaluate import evaluate_script, heldout_tasks
from agentopd.rendering import HermesJSON
from agentopd.runs import Run
from agentopd.tracking import read_jsonl
from agentopd.train import train
from agentopd.types import VerdictStatus
from benchmarks.faults import OF_THE_MACHINE
from tests.scaleout.conftest import ROOT
from tests.tiny import qwen3

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("default")]
SANDBOX = SandboxConfig(workers=1)
QUICK = {"health_s": 5.0, "deadline_s": 120.0}


@pytest.fixture(scope="module")
def judged(skills):
    """Tasks by id, and episodes with the verdicts of this process: solved ones and others."""
    tasks = heldout_tasks(skills.values(), 4, 0)
    judge = Judge(skills.values(), build_sandbox(SANDBOX, skills.values()))

    async def play():
        try:
            parts = [await evaluate_script(script, skills, tasks, judge, HermesJSON()) for script in ("gold", "noop")]
            return [item for part in parts for item in part]
        finally:
            await judge.sandbox.aclose()

    found = asyncio.run(play())
    assert {verdict.outcome for _, verdict in found} == {0.0, 1.0}
    return {task.id: task for items in tasks.values() for task in items}, found


def remote(skills, resource, workers, **more):
    """A judge whose work is done on the nodes that have ``resource``."""
    config = RayConfig(verification_workers=workers, verification_resource=resource, **{**QUICK, **more})
    return Judge(skills.values(), build_sandbox(SANDBOX, skills.values(), config))


def test_verdicts_equal_those_in_process(machines, skills, judged):
    tasks, found = judged
    resource, _ = machines(1)
    judge = remote(skills, resource, 1)

    async def again():
        try:
            await judge.sandbox.start()
            verdicts = await asyncio.gather(*(judge(tasks[episode.task_id], episode) for episode, _ in found))
            cases = [Case("a", "add(*args)", args=(2, 3)), Case("b", "missing")]
            return verdicts, await judge.sandbox.run_cases(Program("def add(a, b): return a + b"), cases)
        finally:
            await judge.sandbox.aclose()

    verdicts, results = asyncio.run(again())
    assert verdicts == [verdict for _, verdict in found]
    assert [result.value for result in results] == [5, None] and {"net", "pid"} <= judge.sandbox.capabilities


def test_a_machine_that_dies_costs_no_verdict(cluster, machines, skills, judged):
    tasks, found = judged
    resource, nodes = machines(2)
    judge, many = remote(skills, resource, 2), found * 4

    async def under_fire():
        try:
            await judge.sandbox.start()
            pending = [asyncio.create_task(judge(tasks[episode.task_id], episode)) for episode, _ in many]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(cluster.remove_node, nodes[0], allow_graceful=False)
            # Those under way may all be done by the time the machine is gone; these meet a worker that is lost.
            pending += [asyncio.create_task(judge(tasks[episode.task_id], episode)) for episode, _ in many]
            return await asyncio.gather(*pending)
        finally:
            await judge.sandbox.aclose()

    assert asyncio.run(under_fire()) == [verdict for _, verdict in many] * 2
    assert judge.sandbox.pool.replaced == 1


def test_without_a_worker_there_is_no_score(cluster, machines, skills, judged):
    tasks, found = judged
    resource, (node,) = machines(1)
    judge = remote(skills, resource, 1, deadline_s=20.0, attempts=2)

    async def alone():
        await judge.sandbox.start()
        await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
        judge.sandbox.pool._config = judge.sandbox.pool._config.model_copy(update={"deadline_s": 3.0})
        started = time.monotonic()
        verdict = await judge(tasks[found[0][0].task_id], found[0][0])
        return verdict, time.monotonic() - started

    verdict, seconds = asyncio.run(alone())
    assert verdict.outcome is None and verdict.status is VerdictStatus.INFRA_ERROR
    assert seconds < 60


def test_samples_equal_those_in_process_over_an_update_and_a_loss(cluster, machines):
    resource, nodes = machines(2)
    model = qwen3(64)
    params = SamplingParams(max_tokens=12, stop_ids=(1,))
    asked = [GenerationRequest((5, 6, 7 + n), params, seed=n, session=str(n)) for n in range(6)]
    here = build_engine(model, RolloutConfig())
    there = build_engine(model, RolloutConfig(), RayConfig(rollout_workers=2, rollout_resource=resource, **QUICK))
    first = asyncio.run(both(here, there, asked))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    for engine in (here, there):
        engine.sync_weights(1)

    async def after_a_loss():
        alive = asyncio.create_task(both(here, there, asked))
        await asyncio.to_thread(cluster.remove_node, nodes[0], allow_graceful=False)
        found = await alive
        found += await both(here, there, asked)
        await there.aclose()
        return found

    second = asyncio.run(after_a_loss())
    assert [x.token_ids for x in first[0]] != [x.token_ids for x in second[0]]
    for mine, theirs in (first, second[:2], second[2:]):
        assert [x.token_ids for x in theirs] == [x.token_ids for x in mine]
        assert [x.weight_version for x in theirs] == [x.weight_version for x in mine]
        for a, b in zip(mine, theirs, strict=True):
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)


def test_a_run_with_workers_is_the_run_without(cluster, machines, tmp_path):
    resource, _ = machines(2)
    tiny = ("train.steps=1", "train.prompts_per_step=3", "rollout.group_size=2", "eval.tasks_per_skill=1", "threads=1")
    workers = (
        *(f"ray.{kind}_workers=1" for kind in ("rollout", "verification")),
        *(f"ray.{kind}_resource={resource}" for kind in ("rollout", "verification")),
        f"ray.address={cluster.address}",
    )
    found = {}
    for name, more in {"without": (), "with": workers}.items():
        overrides = ["objective.stages=[]", *tiny, *more, f"run_dir={tmp_path / name}", "eval.start_kl=false"]
        run = Run.start(load_run_config(ROOT / "configs/quickstart.toml", overrides))
        asyncio.run(train(run, make_console(plain=True)))
        rows = read_jsonl(run.root / "metrics.jsonl")
        found[name] = [{key: row[key] for key in row if not key.startswith(OF_THE_MACHINE)} for row in rows]
    assert found["with"] == found["without"]


async def both(here, there, asked):
    mine, theirs = await asyncio.gather(here.generate(asked), there.generate(asked))
    return [mine, theirs]


def test_no_room_says_so(cluster, skills):
    judge = remote(skills, "nowhere", 1, deadline_s=2.0)
    with pytest.raises(Exception, match=r"no machine of the cluster had room with resource 'nowhere' within 2 s"):
        asyncio.run(judge.sandbox.start())
