"""Where a step's trajectories come from: the student, its teacher, gold, or disk. One function per kind of source.

Whoever acts, the episode is token-exact in the student's tokens and judged like any other.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from agentopd.build import live_options
from agentopd.config.objective import anchor_coef
from agentopd.config.objective_data import GoldNLL, MixedSource, TeacherAnchor, TeacherSource
from agentopd.demonstrations import Demonstrator
from agentopd.errors import UserError
from agentopd.evaluate import Judged, stable_seed
from agentopd.learner import runtime
from agentopd.mixture import Drawn
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_scripted, stream_episodes
from agentopd.rollout.runner import Admission
from agentopd.runs import Run
from agentopd.types import Episode, Task

Collect = Callable[[Run, Sequence[Drawn]], Awaitable[list[Judged]]]


async def collect(run: Run, drawn: Sequence[Drawn]) -> tuple[list[Judged], list[Judged]]:
    """The step's episodes, judged, from the source that is in force: the student's own, and anybody else's."""
    source = run.blocks.source
    if not isinstance(source, MixedSource):
        found = await _SOURCES[source.kind](run, drawn)
        return (found, []) if source.kind in ("student", "offline") else ([], found)
    mine, others = student_answers(drawn, source.student_share, run.step)
    return await _student(run, mine), await _SOURCES[source.other](run, others)


async def collect_beside(run: Run, drawn: Sequence[Drawn], own: Sequence[Judged]) -> list[Judged]:
    """Gold or teacher trajectories that only the anchor reads, beside the student's ``own``; [] where none."""
    blocks = run.blocks
    if blocks.source.kind != "student" or anchor_coef(blocks.anchor, run.progress) == 0:
        return []
    if isinstance(blocks.anchor, GoldNLL):
        return await _gold(run, drawn if blocks.anchor.prompts == "all" else unsolved(drawn, own))
    assert isinstance(blocks.anchor, TeacherAnchor)
    chosen = phased_prompts(drawn, blocks.anchor.prompt_share, run.step)
    return _kept(await _teacher(run, chosen), blocks.anchor.filter_correct)


def phased_prompts(drawn: Sequence[Drawn], share: float, step: int) -> list[Drawn]:
    """The ``ceil(share n)`` prompts of a step that the teacher answers, in the order drawn."""
    size = math.ceil(share * len(drawn))
    order = sorted(range(len(drawn)), key=lambda i: stable_seed("phased", step, drawn[i].skill, drawn[i].task.id))
    return [drawn[i] for i in sorted(order[:size])]


def unsolved(drawn: Sequence[Drawn], judged: Sequence[Judged]) -> list[Drawn]:
    """The prompts of which at least one rollout was judged and none passed, in the order drawn."""
    tried, solved = tried_and_solved(judged)
    return [item for item in drawn if item.task.hash in tried - solved]


def tried_and_solved(judged: Sequence[Judged]) -> tuple[set[str], set[str]]:
    """Hashes of the tasks with a judged rollout, and of those with one that passed."""
    tried = {episode.task_hash for episode, verdict in judged if verdict.outcome is not None}
    return tried, {episode.task_hash for episode, verdict in judged if verdict.passed}


def student_answers(drawn: Sequence[Drawn], share: float, step: int) -> tuple[list[Drawn], list[Drawn]]:
    """A step's prompts split into those the student answers and the others; ``round(share n)`` are the student's."""
    order = sorted(range(len(drawn)), key=lambda i: stable_seed("mixed", step, drawn[i].skill, drawn[i].task.id))
    mine = set(order[: round(share * len(drawn))])
    return [drawn[i] for i in sorted(mine)], [drawn[i] for i in range(len(drawn)) if i not in mine]


async def _student(run: Run, drawn: Sequence[Drawn]) -> list[Judged]:
    """Episodes of every prompt's group, judged as they finish while others still sample."""
    specs = [spec for item in drawn for spec in _group(run, item, run.config.rollout.group_size)]
    return await stream_episodes(specs, run.policy.engine, run.policy.renderer, _judged(run), _options(run))


async def _gold(run: Run, drawn: Sequence[Drawn]) -> list[Judged]:
    finished, options = _judged(run), _options(run)
    specs = [spec for item in drawn for spec in _group(run, item, 1)]
    queue = Admission([spec.skill for spec in specs], options.max_live)

    async def play(index: int, spec: EpisodeSpec) -> Judged:
        turns = spec.env_cls.gold_turns(spec.task)  # type: ignore[attr-defined]
        await queue.admitted(index)
        try:
            played = await run_scripted(spec, turns, run.policy.codec, run.policy.renderer, options)
        finally:
            queue.leave(index)
        return await finished(spec, played)

    return list(await asyncio.gather(*(play(index, spec) for index, spec in enumerate(specs))))


async def _teacher(run: Run, drawn: Sequence[Drawn], num: int = 1) -> list[Judged]:
    """``num`` episodes of each prompt, played by the teacher its skill is routed to; sampled once and kept."""
    found: dict[int, list[Judged]] = {}
    for key, demonstrator in sorted(run.teachers.demonstrators.items()):
        mine = [i for i, item in enumerate(drawn) if run.teachers.routes[item.skill] == key]
        answers = await demonstrator.answer([(drawn[i].skill, drawn[i].task) for i in mine], num)
        found.update(zip(mine, answers, strict=True))
    return [judged for i in range(len(drawn)) for judged in found[i]]


async def _teacher_source(run: Run, drawn: Sequence[Drawn]) -> list[Judged]:
    source = run.blocks.source
    judged = await _teacher(run, drawn, run.config.rollout.group_size)
    return _kept(judged, isinstance(source, TeacherSource) and source.filter_correct)


async def _stored(run: Run, drawn: Sequence[Drawn]) -> list[Judged]:
    """The starting student's rollouts, from disk."""
    assert run.teachers.stored_rollouts is not None
    prompts = [(item.skill, item.task) for item in drawn]
    _require_stored(run.teachers.stored_rollouts, prompts, run.config.rollout.group_size)
    answers = await run.teachers.stored_rollouts.answer(prompts, run.config.rollout.group_size)
    return [judged for answer in answers for judged in answer]


async def store_rollouts(run: Run) -> None:
    """Sample, judge and score every training task once, before the first step, where rollouts are read from disk.

    Only what the folder lacks is made; ranks share the work. Raises ``UserError`` where something is lacking after the
    first step: the student that could have sampled it is gone.
    """
    stored = run.teachers.stored_rollouts
    if stored is None:
        return
    every = [(name, task) for name in run.teachers.routes for task in run.skills[name].train_tasks(run.config.seed)]
    prompts = every[runtime.rank() :: runtime.world_size()]
    num = run.config.rollout.group_size
    if run.step:
        _require_stored(stored, prompts, num)
    judged = [item for answer in await stored.answer(prompts, num) for item in answer]
    by_teacher: dict[str, list[Episode]] = {}
    for episode, _ in judged:
        if episode.num_sampled:
            by_teacher.setdefault(run.teachers.routes[episode.skill], []).append(episode)
    for key, episodes in sorted(by_teacher.items()):
        await run.teachers.by_key[key].score(episodes, run.blocks.top_k)
    runtime.barrier()


def _require_stored(stored: Demonstrator, prompts: Sequence[tuple[str, Task]], num: int) -> None:
    """Whoever is asked after the first step is no longer the starting student, and must not answer in its name."""
    if not all(stored.has(*prompt, num) for prompt in prompts):
        raise UserError(f"{str(stored.cache.root)!r} has lost rollouts of the starting student: start the run again")


_SOURCES: dict[str, Collect] = {
    "student": _student,
    "gold": _gold,
    "teacher": _teacher_source,
    "offline": _stored,
}


def _kept(judged: Sequence[Judged], filter_correct: bool) -> list[Judged]:
    """Without failed, cut-off or unjudged rollouts where only correct ones are wanted."""
    return [item for item in judged if not filter_correct or (item[1].passed and not item[0].stop_reason.truncated)]


def _judged(run: Run) -> Callable[[EpisodeSpec, Episode], Awaitable[Judged]]:
    async def finished(spec: EpisodeSpec, episode: Episode) -> Judged:
        return episode, await run.judge(spec.task, episode)

    return finished


def _options(run: Run) -> RolloutOptions:
    rollout, live = run.config.rollout, live_options(run.skills.values())
    return RolloutOptions(rollout.temperature, rollout.top_p, rollout.max_malformed, run.judge.sandbox, **live)


def _group(run: Run, item: Drawn, copies: int) -> list[EpisodeSpec]:
    draw = f"{run.step}+{item.nth}" if item.nth else str(run.step)
    group = f"{draw}/{item.skill}/{item.task.id}"
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
