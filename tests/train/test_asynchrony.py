"""Rollouts ahead of the update: the synchronous loop where nothing is ahead, else a bounded and measured staleness."""

import asyncio
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentopd.config import load_run_config
from agentopd.console import make_console
from agentopd.contracts import Evidence
from agentopd.engines import hf
from agentopd.engines.background import Gate
from agentopd.models import load_model, load_tokenizer, vocabulary_hash
from agentopd.pipeline import Rollouts
from agentopd.runs import Run
from agentopd.teachers.local import LocalTeacher
from agentopd.teachers.served import ServedTeacher
from agentopd.teachers.server import Identity, TeacherServer
from agentopd.tracking import RunDirectory, read_jsonl
from agentopd.train import train, train_step, update
from agentopd.types import Episode
from benchmarks.faults import OF_THE_MACHINE

TINY = ("train.prompts_per_step=3", "eval.tasks_per_skill=1", "eval.start_kl=false")


def metrics(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)} for row in rows]


async def in_turn(run: Run) -> None:
    """Draw, sample, score, update: nothing overlaps, and nothing is begun before it is needed."""
    await run.open()
    await run.evaluate("base")
    while run.step < run.config.train.steps:
        rollouts = Rollouts(run)
        await train_step(run, await rollouts.take())
        await rollouts.aclose()
    run.export()
    await run.aclose()


@pytest.mark.slow
def test_nothing_ahead_is_the_synchronous_loop(quickstart, small):
    one = Run.start(load_run_config(quickstart, small("train.steps=2", *TINY, name="one")))
    asyncio.run(in_turn(one))
    two = Run.start(load_run_config(quickstart, small("train.steps=2", *TINY, name="two")))
    asyncio.run(train(two, make_console(plain=True)))
    assert metrics(one.root) == metrics(two.root)
    assert [(row["rollout/staleness"], row["rollout/staleness_max"]) for row in metrics(two.root)] == [(0, 0)] * 2
    weights = [(run.root / "model/model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_rollouts_overlap_and_are_no_staler_than_allowed(quickstart, small):
    run = Run.start(load_run_config(quickstart, small("train.steps=4", "train.max_staleness=2", *TINY)))
    asyncio.run(train(run, make_console(plain=True)))
    rows = metrics(run.root)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(0 <= row["rollout/staleness"] <= row["rollout/staleness_max"] <= 2 for row in rows)
    # Its weights were older, so a batch was begun before the update of the one before it.
    assert max(row["rollout/staleness"] for row in rows) > 0
    versions = {
        (item.step, turn.weight_version)
        for item in RunDirectory.open(run.root).kept_episodes()
        for turn in item.episode.turns
    }
    assert all(0 <= step - 1 - version <= 2 for step, version in versions)


@pytest.mark.slow
def test_a_run_cuts_turns_at_its_updates(quickstart, small, monkeypatch):
    options = ("train.max_staleness=1", "rollout.cut_turns=true", "tracking.episodes_per_step=12")
    run = Run.start(load_run_config(quickstart, small("train.steps=4", *options, *TINY)))
    due, step = threading.Event(), hf._Batch.step

    async def with_one_due(run: Run, collected: Any) -> Any:
        if run.step + 1 < run.config.train.steps:  # nothing is sampled ahead of the last update
            due.set()
        return await train_step(run, collected)

    def until_it_comes(batch: Any) -> None:
        step(batch)
        while due.is_set() and run.policy.engine._no_update.is_set():
            time.sleep(0.001)

    async def noted(run: Run, *rest: Any) -> dict[str, float]:
        try:
            return await update(run, *rest)
        finally:
            due.clear()

    monkeypatch.setattr("agentopd.train.train_step", with_one_due)
    monkeypatch.setattr("agentopd.train.update", noted)
    monkeypatch.setattr(hf._Batch, "step", until_it_comes)
    asyncio.run(train(run, make_console(plain=True)))
    turns = [(x.step, turn) for x in RunDirectory.open(run.root).kept_episodes() for turn in x.episode.turns]
    assert {step for step, turn in turns if turn.updates} == {2, 3, 4}
    assert all(0 <= step - 1 - version <= 1 for step, turn in turns for version, _ in turn.weight_spans)
    assert all(0 < row["rollout/staleness"] < 1 for row in metrics(run.root)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_teacher_elsewhere_scores_what_is_sampled_while_the_learner_works(quickstart, small, monkeypatch, ahead):
    student = load_model("micro/student", "float32").requires_grad_(False)
    identity = Identity("weights", vocabulary_hash(load_tokenizer("micro/student")))
    updates: list[tuple[int, float, float]] = []
    asked: list[tuple[set[int], float]] = []
    score = ServedTeacher.score

    async def watched(teacher: ServedTeacher, episodes: Sequence[Episode], top_k: int) -> list[Evidence]:
        asked.append(({int(episode.id.split("/")[0]) for episode in episodes}, time.monotonic()))
        return await score(teacher, episodes, top_k)

    async def noted(run: Run, *rest: Any) -> dict[str, float]:
        step, began = run.step, time.monotonic()
        await asyncio.to_thread(time.sleep, 1.0)  # an update of a student that is no toy
        found = await update(run, *rest)
        updates.append((step, began, time.monotonic()))
        return found

    monkeypatch.setattr("agentopd.train.update", noted)
    monkeypatch.setattr(ServedTeacher, "score", watched)
    server = TeacherServer(LocalTeacher("far", student), identity)
    far = f'teachers.default={{kind = "served", base_url = "{server.base_url}"}}'
    overrides = small("train.steps=4", f"train.max_staleness={ahead}", far, 'objective.anchor={kind = "none"}', *TINY)
    try:
        run = Run.start(load_run_config(quickstart, overrides))
        asyncio.run(train(run, make_console(plain=True)))
    finally:
        server.close()
    beside = [(step, steps) for step, *when in updates for steps, at in asked if when[0] < at < when[1]]
    assert bool(beside) == bool(ahead) and all(min(steps) > step for step, steps in beside)
    assert [steps for steps, _ in asked] == [{0}, {1}, {2}, {3}]  # each once, ahead or not


@pytest.mark.slow
def test_prompts_drawn_ahead_are_drawn_again_after_a_resume(quickstart, small):
    retrying = (*TINY, "train.prompts_per_step=6", "train.retry_share=0.9", "tracking.episodes_per_step=12")
    overrides = small("train.steps=3", "train.max_staleness=1", *retrying, name="ahead")
    ahead = Run.start(load_run_config(quickstart, overrides))
    asyncio.run(train(ahead, make_console(plain=True)))
    cut = ahead.root.with_name("cut")
    shutil.copytree(ahead.root, cut)
    shutil.rmtree(cut / "checkpoints/step-000003")
    resumed = Run.resume(cut)
    assert resumed.step == 2
    asyncio.run(train(resumed, make_console(plain=True)))

    def prompts(path: Path) -> set[tuple[int, str]]:
        return {(item.step, item.episode.task_id) for item in RunDirectory.open(path).kept_episodes()}

    assert prompts(cut) == prompts(ahead.root)


def test_nothing_that_was_begun_goes_on_after_a_close(monkeypatch):
    """Not even what was begun and never awaited: the engine and the sandbox are closed next."""
    began: list[int] = []

    async def sampled(run: Any, prompts: Any) -> tuple[list[Any], list[Any]]:
        began.append(run.step)
        return [], []

    async def beside(*_: Any) -> list[Any]:
        return []

    @dataclass
    class Begun:
        config: Any
        mixture: Any
        teachers: Any
        blocks: Any
        step: int = 0

        def enter_stage(self) -> None:
            pass

    run = Begun(
        SimpleNamespace(train=SimpleNamespace(max_staleness=1, steps=10, prompts_per_step=1), stage_at=lambda step: 0),
        SimpleNamespace(ahead=lambda *_: SimpleNamespace(drawn=[], shares={}), taken=lambda: None),
        SimpleNamespace(elsewhere=lambda: SimpleNamespace(routes={})),
        SimpleNamespace(needs_teacher=True, top_k=0),
    )

    async def scene() -> None:
        rollouts = Rollouts(run)
        await rollouts.take()
        while began != [0, 1]:
            await asyncio.sleep(0)
        run.step = 1
        await asyncio.sleep(0.1)
        await rollouts.take()  # is there: the next batch is begun, and the loop has not come to it
        await rollouts.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(0.1)

    monkeypatch.setattr("agentopd.pipeline.collect", sampled)
    monkeypatch.setattr("agentopd.pipeline.collect_beside", beside)
    asyncio.run(scene())
    assert began == [0, 1]


def test_a_closed_gate_waits_for_what_is_inside_and_lets_nothing_in():
    async def scene() -> list[str]:
        gate, events, leave = Gate(), [], asyncio.Event()

        async def inside(name: str) -> None:
            async with gate:
                events.append(f"{name} in")
                await leave.wait()
                events.append(f"{name} out")

        first = asyncio.create_task(inside("first"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(gate.close())
        await asyncio.sleep(0)
        second = asyncio.create_task(inside("second"))
        await asyncio.sleep(0)
        assert not closing.done()
        leave.set()
        await closing
        events.append("closed")
        await gate.open()
        await asyncio.gather(first, second)
        return events

    assert asyncio.run(scene()) == ["first in", "first out", "closed", "second in", "second out"]
