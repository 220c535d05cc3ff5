"""The training loop: one line per stage, no branches on the algorithm.

weights -> mixture draws prompts -> rollout || verify -> teacher scores -> batch -> loss and update -> log -> evaluate
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console

from agentopd.batching import build_batch
from agentopd.collect import store_rollouts, tried_and_solved
from agentopd.contracts import Evidence, ScoredEpisode
from agentopd.dashboard import Seen, watching
from agentopd.evaluate import Judged
from agentopd.evaluation.metrics import EvalResult
from agentopd.inspection import inspect
from agentopd.learner import runtime
from agentopd.objective.streams import Batch
from agentopd.pipeline import Collected, Rollouts, apart
from agentopd.reaction import react, watch
from agentopd.rubrics import reward
from agentopd.runs import Run
from agentopd.scoring import add_candidates, add_reference, assemble, gather_evidence
from agentopd.stats import Clock, cost_metrics, staleness_metrics, step_metrics
from agentopd.teachers.local import top_ids
from agentopd.types import Task


@dataclass(frozen=True)
class Outcome:
    """A finished run's evaluations, before and after."""

    base: EvalResult
    after: EvalResult
    teacher: EvalResult | None


async def train(run: Run, console: Console) -> Outcome | None:
    """Train from ``run.step`` to the end, evaluating and checkpointing on the way; closes the run.

    After SIGTERM or Ctrl-C the step or evaluation under way is finished and saved, and there is no outcome unless it
    was the last of all; a second Ctrl-C raises ``KeyboardInterrupt`` at once.
    """
    rollouts = Rollouts(run)
    with _told_to_stop() as stopping:
        try:
            return await _trained(run, rollouts, console, stopping)
        finally:
            await rollouts.aclose()
            await run.aclose()


async def _trained(run: Run, rollouts: Rollouts, console: Console, stopping: Callable[[], bool]) -> Outcome | None:
    schedule = run.config.train
    await run.open()
    if not run.restored:
        await _measure_start(run)
    await store_rollouts(run)
    if stopping():
        run.checkpoint()  # what was measured so far is not measured again
        return None
    with watching(console, schedule.steps, run.step, tuple(run.skills)) as show:
        while run.step < schedule.steps:
            show(await train_step(run, await rollouts.take()))
            if await _evaluated(run):
                react(run)
            told = stopping()
            if _due(run.step, schedule.checkpoint_every) or run.step == schedule.steps or told:
                run.checkpoint()
            if told:
                return None
    after = await run.evaluate("final")
    run.export()
    return Outcome(run.evals["base"], after, run.evals.get("teacher"))


async def _measure_start(run: Run) -> None:
    """Evaluate student and teachers before the first step, but for what was measured before an interruption."""
    if "base" in run.evals:
        run.inform_replay(run.evals["base"])
    else:
        await run.evaluate("base")
    if "teacher" not in run.evals:
        await run.evaluate_teacher()
    react(run)


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came to any rank, which do not end the process; a second Ctrl-C does.

    Every rank must ask. Only a process's main thread can listen.
    """
    told, interrupted = threading.Event(), threading.Event()

    def heard(number: int, _: object) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            interrupted.set()
            if runtime.rank() == 0:  # printing could meet a print that the signal interrupted
                os.write(2, b"finishing what is under way, then saving; Ctrl-C again ends at once\n")
        told.set()

    listening = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT) if listening}
    try:
        # The signal reaches the ranks of a launched job between different steps.
        yield lambda: bool(runtime.all_reduce_max(told.is_set()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def train_step(run: Run, collected: Collected) -> Seen:
    """Judge against one another, score, update, log. Returns what there is to see of the step."""
    clock, blocks, shares, tasks = collected.clock, run.blocks, collected.shares, collected.tasks
    judged = [*collected.own, *collected.others]
    verdicts = run.judge.compare(judged, tasks)
    judged = [(episode, verdict) for (episode, _), verdict in zip(judged, verdicts, strict=True)]
    for tried, solved in runtime.gather_objects(tried_and_solved(collected.own)):
        run.mixture.record(collected.drawn, tried, solved)
    watch(run, collected.own)
    if not run.config.train.max_staleness:
        run.policy.engine.sleep()
    with clock.phase("teacher"):
        rewarded = await reward(run, judged, tasks)
        scored = await apart(run, score(run, rewarded, tasks, known=collected.evidence))
        anchors = await apart(run, score(run, collected.beside, tasks, anchor=True))
    shown = [replace(item, verdict=verdict) for item, (_, verdict) in zip(scored, judged, strict=True)]
    with clock.phase("learner"):
        both = [*scored, *anchors]
        batch = build_batch(both, blocks, shares, run.classify, run.policy.pad_id, all_reduce=runtime.all_reduce)
        kept = inspect(run, blocks, shown, batch, tasks)
    acting = collected.others if blocks.source.kind in ("gold", "teacher") else collected.own
    again = {item.task.hash for item in collected.drawn if item.again}
    replayed = {f"replay/share/{name}": shares[name] for name in sorted(run.old_skills)}
    measured = step_metrics(acting, again) | cost_metrics(scored) | staleness_metrics(collected.own, run.step)
    learned = await apart(run, update(run, batch, clock))
    run.quarantine(both, batch)
    metrics = {**measured, **replayed, **learned, **clock.metrics()}
    run.log(metrics)
    if run.directory is not None:
        run.directory.keep_episodes(run.step, kept)
    return Seen(run.step, metrics, acting)


async def update(run: Run, batch: Batch, clock: Clock) -> dict[str, float]:
    """Take the optimiser step and give the engine its weights. No turn is sampled from weights that are changing."""
    with run.policy.engine.updating():
        with clock.phase("learner"):
            learned = run.learner.step(batch)
        run.step += 1
        with clock.phase("sync"):
            return {**learned, **run.policy.engine.sync_weights(run.step)}


async def score(
    run: Run,
    judged: Sequence[Judged],
    tasks: Mapping[str, Task],
    *,
    known: Sequence[Evidence | None] = (),
    anchor: bool = False,
) -> list[ScoredEpisode]:
    """The teacher's (and the reference's) evidence on the episodes' own tokens; an anchor reads a top-K or nothing."""
    episodes, verdicts = [episode for episode, _ in judged], [verdict for _, verdict in judged]
    blocks, teachers = run.blocks, run.teachers
    evidence: list[Evidence | None] = [None] * len(episodes)
    if blocks.top_k if anchor else blocks.needs_teacher or blocks.top_k:
        evidence = await gather_evidence(episodes, teachers, blocks.top_k, tasks, known)
    if blocks.student_top_k and not anchor:
        candidates = top_ids(run.policy.model, episodes, blocks.student_top_k)
        evidence = await add_candidates(episodes, evidence, candidates, teachers, tasks)
    if blocks.needs_reference and not anchor:
        evidence = await add_reference(episodes, evidence, teachers.reference_routes, teachers.references)
    return assemble(episodes, verdicts, evidence, run.old_skills, anchor)


async def _evaluated(run: Run) -> bool:
    """Evaluate where it is due before the end: every skill after a stage, those of stages so far in between."""
    step, config = run.step, run.config
    if run.finished_stage is not None:
        await run.evaluate(f"after_{run.finished_stage}")
    elif _due(step, config.train.eval_every) and step < config.train.steps:
        await run.evaluate(f"step_{step:06d}", (*config.new_at(step), *config.old_at(step)))
    else:
        return False
    return True


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
