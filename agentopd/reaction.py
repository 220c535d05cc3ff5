"""How a run answers what it sees of its old skills: replay shares move, guards act, everything is logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from agentopd.evaluate import Judged
from agentopd.learner import runtime
from agentopd.mixture import Action, GuardState, guard_actions
from agentopd.runs import Run


def react(run: Run) -> None:
    """Let the replay policy and the guard answer the latest scores of the old skills.

    While every old skill is within its tolerance, a guarded run checkpoints here: this is where it would return to.
    """
    tolerance = run.tolerated_drop
    if tolerance is None:
        return
    run.enter_stage()
    old = sorted(run.old_skills)
    before = run.mixture.shares()
    run.mixture.react(tolerance)
    _record_moves(run, run.step, before, {skill: run.mixture.scores.loss(skill) for skill in old})
    if not run.config.guard.enabled or not old:
        return
    if all(run.mixture.scores.loss(skill) <= tolerance for skill in old):
        run.kept_step = run.step
        run.checkpoint()
        return
    state = GuardState(run.step, run.mixture.share, run.learner.rate_scale, run.kept_step)
    for action in guard_actions(run.config.guard, run.config.replay, run.mixture.scores, old, tolerance, state):
        _apply(run, action)
        run.record(action)


def watch(run: Run, own: Sequence[Judged]) -> None:
    """Let the replay policy see how the student's ``own`` episodes of old skills went, of this step and all ranks."""
    tolerance, old = run.tolerated_drop, run.old_skills
    if tolerance is None or run.blocks.source.kind not in ("student", "mixed") or not run.mixture.is_budgeted:
        return
    mine = [(episode.skill, episode.task_hash, verdict.outcome) for episode, verdict in own if episode.skill in old]
    outcomes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in runtime.gather_objects(mine):
        for skill, prompt, outcome in part:
            if outcome is not None:
                outcomes[skill][prompt].append(outcome)
    # Rollouts of one prompt succeed and fail together: a prompt is one witness.
    means = {skill: [fmean(found) for found in prompts.values()] for skill, prompts in outcomes.items()}
    before = run.mixture.shares()
    _record_moves(run, run.step + 1, before, run.mixture.observe(means, tolerance))


def _record_moves(run: Run, step: int, before: Mapping[str, float], drops: Mapping[str, float]) -> None:
    after = run.mixture.shares()
    for skill, drop in drops.items():
        if after[skill] != before[skill]:
            run.record(
                Action(
                    step=step,
                    action="replay_shares",
                    skill=skill,
                    drop=drop,
                    before=before[skill],
                    after=after[skill],
                )
            )


def _apply(run: Run, action: Action) -> None:
    if action.action == "roll_back":
        scores, known = run.roll_back(int(action.after)).scores(), run.mixture.scores.base
        scores.base = known | scores.base  # a skill that a stage has taught since keeps its first score
        run.mixture.scores = scores
    elif action.action == "raise_share":
        run.mixture.share = action.after
    elif action.action == "lower_lr":
        run.learner.rate_scale = action.after
