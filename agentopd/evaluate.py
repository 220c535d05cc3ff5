"""Evaluation: a student, or a fixed script, on the held-out tasks of a suite."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from agentopd.build import Judge, Policy, Skill, live_options
from agentopd.config.run import EvalConfig
from agentopd.contracts import Teacher
from agentopd.errors import TeacherError
from agentopd.evaluation.metrics import EvalResult, score_skill
from agentopd.learner.runtime import gather_objects, rank, world_size
from agentopd.rendering.codecs import ToolCodec
from agentopd.rollout import EpisodeSpec, RolloutOptions, run_scripted, stream_episodes
from agentopd.types import Episode, Message, Split, Task, Verdict

Script = Literal["gold", "noop", "starter"]
SCRIPTS: tuple[Script, ...] = ("gold", "noop", "starter")
Judged = tuple[Episode, Verdict]
OnJudged = Callable[[], None]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def heldout_split(skill: Skill) -> Split:
    """Old skills are measured on their retention split, new ones on their eval split; neither is trained on."""
    return "retention" if skill.config.role == "old" else "eval"


def heldout_tasks(skills: Iterable[Skill], limit: int | None, seed: int) -> dict[str, list[Task]]:
    """The held-out tasks of every skill."""
    return {skill.name: skill.tasks(heldout_split(skill), limit, seed) for skill in skills}


def eval_specs(
    tasks: dict[str, list[Task]], skills: dict[str, Skill], k: int, seed: int
) -> list[tuple[Task, EpisodeSpec]]:
    """``k`` episodes of every task. Seeds depend on task and attempt only, so evaluations are paired."""
    return [
        (
            task,
            EpisodeSpec(
                task=task,
                env_cls=skills[name].env,
                id=f"{name}/{task.id}#{attempt}",
                group_id=f"{name}/{task.id}",
                skill=name,
                seed=stable_seed("eval", seed, name, task.id, attempt),
            ),
        )
        for name, items in tasks.items()
        for task in items
        for attempt in range(k)
    ]


async def evaluate_model(
    policy: Policy,
    skills: dict[str, Skill],
    tasks: dict[str, list[Task]],
    judge: Judge,
    config: EvalConfig,
    on_judged: OnJudged = lambda: None,
    max_malformed: int = RolloutOptions.max_malformed,
) -> list[Judged]:
    """Sample and judge ``config.k`` episodes of every task. Ranks share the work; all return all results."""
    specs = eval_specs(tasks, skills, config.k, config.seed)[rank() :: world_size()]
    live = live_options(skills.values())
    options = RolloutOptions(config.temperature, max_malformed=max_malformed, sandbox=judge.sandbox, **live)

    async def finished(spec: EpisodeSpec, episode: Episode) -> Judged:
        verdict = await judge(spec.task, episode)
        on_judged()
        return episode, verdict

    judged = await stream_episodes([spec for _, spec in specs], policy.engine, policy.renderer, finished, options)
    return [item for part in gather_objects(judged) for item in part]


async def evaluate_script(
    script: Script,
    skills: dict[str, Skill],
    tasks: dict[str, list[Task]],
    judge: Judge,
    codec: ToolCodec,
    on_judged: OnJudged = lambda: None,
) -> list[Judged]:
    """Play a fixed script on every task: the gold solution, nothing at all, or the shipped starting point.

    No more episodes of a skill are under way than its ``max_live``, and no more than 64 in all.
    """
    options = RolloutOptions(sandbox=judge.sandbox)
    gate = asyncio.Semaphore(64)
    gates = {name: asyncio.Semaphore(skill.config.max_live or 64) for name, skill in skills.items()}

    async def one(task: Task, spec: EpisodeSpec) -> Judged:
        async with gates[spec.skill], gate:
            episode = await run_scripted(spec, script_turns(script, spec, task), codec, options=options)
            verdict = await judge(task, episode)
        on_judged()
        return episode, verdict

    return list(await asyncio.gather(*(one(task, spec) for task, spec in eval_specs(tasks, skills, 1, 0))))


def script_turns(script: Script, spec: EpisodeSpec, task: Task) -> Sequence[Message]:
    """The assistant messages of a script for one task."""
    turns: dict[Script, Callable[[], Sequence[Message]]] = {
        "gold": lambda: spec.env_cls.gold_turns(task),  # type: ignore[attr-defined]
        "starter": lambda: spec.env_cls.starter_turns(task),  # type: ignore[attr-defined]
        "noop": lambda: (Message(role="assistant"),),
    }
    return turns[script]()


async def start_kl(judged: Sequence[Judged], start: Teacher) -> dict[str, dict[str, float]]:
    """KL(model, start) by skill and task, in nats per sampled token, from episodes sampled at temperature 1.

    The mean log-ratio of the sampled tokens is an unbiased estimate of the KL along the model's own episodes.
    """
    episodes = [episode for episode, _ in judged if episode.num_sampled]
    moved: dict[tuple[str, str], list[float]] = defaultdict(list)
    for episode, evidence in zip(episodes, await start.score(episodes, 0), strict=True):
        sampled = [logprob for turn in episode.turns for logprob in turn.rollout_logprobs]
        if not np.isfinite(evidence.teacher_logprobs).all():
            raise TeacherError(f"the starting student gave a log-prob that is not finite on episode {episode.id!r}")
        moved[episode.skill, episode.task_id] += (np.array(sampled) - evidence.teacher_logprobs).tolist()
    by_skill: dict[str, dict[str, float]] = defaultdict(dict)
    for (skill, task), ratios in moved.items():
        by_skill[skill][task] = float(np.mean(ratios))
    return by_skill


def summarise(
    judged: Sequence[Judged],
    model: str,
    k: int,
    *,
    step: int | None = None,
    seed: int = 0,
    kl: Mapping[str, Mapping[str, float]] | None = None,
) -> EvalResult:
    """Scores of every skill from judged episodes; ``kl`` is the KL to the start by skill and task."""
    by_skill: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for episode, verdict in judged:
        by_skill[episode.skill][episode.task_id].append(verdict)
    scores = {name: score_skill(verdicts, k, seed, (kl or {}).get(name)) for name, verdicts in by_skill.items()}
    return EvalResult(tasks=scores, model=model, step=step, seed=seed)
