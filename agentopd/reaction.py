"""How a run answers an evaluation that it made on the way: replay shares move, guards act, everything is logged."""

from __future__ import annotations

from agentopd.mixture import Action, GuardState, ReplayScores, guard_actions
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
    for skill, share in run.mixture.react(tolerance).items():
        if share != before[skill]:
            drop = run.mixture.scores.loss(skill)
            run.record(
                Action(step=run.step, action="replay_shares", skill=skill, drop=drop, before=before[skill], after=share)
            )
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


def _apply(run: Run, action: Action) -> None:
    if action.action == "roll_back":
        then = run.roll_back(int(action.after))
        run.mixture.scores = ReplayScores(dict(then.base), dict(then.current))
    elif action.action == "raise_share":
        run.mixture.share = action.after
    elif action.action == "lower_lr":
        run.learner.rate_scale = action.after
