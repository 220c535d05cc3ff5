"""The training loop: one line per stage, no branches on the algorithm.

weights -> mixture draws prompts -> rollout || verify -> teacher scores -> batch -> loss and update -> log -> evaluate
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from agentopd.batching import build_batch
from agentopd.build import live_options
from agentopd.console import progress
from agentopd.contracts import ScoredEpisode
from agentopd.evaluate import Judged, stable_seed
from agentopd.evaluation.metrics import EvalResult
from agentopd.inspection import keep_episodes
from agentopd.learner import runtime
from agentopd.mixture import Drawn
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_scripted, stream_episodes
from agentopd.runs import Clock, Run
from agentopd.scoring import add_reference, assemble, gather_evidence
from agentopd.stats import step_metrics
from agentopd.types import Episode


@dataclass(frozen=True)
class Outcome:
    """A finished run's evaluations, before and after."""

    base: EvalResult
    after: EvalResult
    teacher: EvalResult | None


async def train(run: Run, console: Console) -> Outcome:
    """Train from ``run.step`` to the end, evaluating and checkpointing on the way; closes the run."""
    schedule = run.config.train
    try:
        await run.open()
        if "base" not in run.evals:
            await run.evaluate("base")
            await run.evaluate_teacher()
        with progress(console, "training", schedule.steps) as advance:
            advance(run.step)
            while run.step < schedule.steps:
                success = await train_step(run)
                advance(1, note=success)
                if _due(run.step, schedule.eval_every) and run.step < schedule.steps:
                    await run.evaluate(f"step_{run.step:06d}")
                if _due(run.step, schedule.checkpoint_every) or run.step == schedule.steps:
                    run.checkpoint()
        after = await run.evaluate("final")
        run.export()
        return Outcome(run.evals["base"], after, run.evals.get("teacher"))
    finally:
        await run.aclose()


async def train_step(run: Run) -> str:
    """One step of design: draw, act, judge, score, update, log. Returns a one-line note of this step's success."""
    clock = Clock()
    drawn = run.mixture.draw(run.config.train.prompts_per_step)
    shares = run.mixture.shares()
    with clock.phase("rollout"):
        judged = await collect(run, drawn[runtime.rank() :: runtime.world_size()])
    with clock.phase("teacher"):
        scored = await score(run, judged)
    with clock.phase("learner"):
        batch = build_batch(
            scored, run.config.objective, shares, run.classify, run.policy.pad_id, all_reduce=runtime.all_reduce
        )
        learned = run.learner.step(batch)
    run.step += 1
    run.policy.engine.sync_weights(run.step)
    metrics = {**step_metrics(judged), **learned, **clock.metrics()}
    run.log(metrics)
    keep_episodes(run, scored, {item.task.id: item.task for item in drawn})
    rates = [f"{name} {100 * metrics[f'{name}/success']:.0f} %" for name in run.skills if f"{name}/success" in metrics]
    return "  ".join(rates)


async def collect(run: Run, drawn: Sequence[Drawn]) -> list[Judged]:
    """Episodes of every prompt, judged as they finish while others still sample."""
    config = run.config
    copies = config.rollout.group_size if config.objective.source == "student" else 1
    specs = [spec for item in drawn for spec in _group(run, item, copies)]
    tasks = {item.task.id: item.task for item in drawn}
    sampling = config.rollout
    live = live_options(run.skills.values())
    options = RolloutOptions(sampling.temperature, sampling.top_p, sampling.max_malformed, run.judge.sandbox, **live)

    async def finished(spec: EpisodeSpec, episode: Episode) -> Judged:
        return episode, await run.judge(tasks[spec.task.id], episode)

    if config.objective.source == "student":
        return await stream_episodes(specs, run.policy.engine, run.policy.renderer, finished, options)

    async def gold(spec: EpisodeSpec) -> Judged:
        turns = spec.env_cls.gold_turns(spec.task)  # type: ignore[attr-defined]
        played = await run_scripted(spec, turns, run.policy.codec, run.policy.renderer, options)
        return await finished(spec, played)

    return list(await asyncio.gather(*(gold(spec) for spec in specs)))


async def score(run: Run, judged: Sequence[Judged]) -> list[ScoredEpisode]:
    """The teacher's (and the reference's) evidence on the student's own tokens."""
    episodes, verdicts = [episode for episode, _ in judged], [verdict for _, verdict in judged]
    objective, teachers = run.config.objective, run.teachers
    evidence = await gather_evidence(episodes, teachers.routes, teachers.by_key, objective.top_k)
    if teachers.reference is not None:
        evidence = await add_reference(episodes, evidence, teachers.reference)
    return assemble(episodes, verdicts, evidence, run.old_skills)


def _group(run: Run, item: Drawn, copies: int) -> list[EpisodeSpec]:
    group = f"{run.step}/{item.skill}/{item.task.id}"
    return [
        EpisodeSpec(
            task=item.task,
            env_cls=run.skills[item.skill].env,
            id=f"{group}#{copy}",
            group_id=group,
            skill=item.skill,
            seed=stable_seed("train", run.config.seed, group, copy),
        )
        for copy in range(copies)
    ]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
