"""Retention guards: what to do about an old skill that an evaluation found beyond the tolerated drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agentopd.config.retention import GuardConfig, ReplayConfig
from agentopd.mixture.replay import ReplayScores
from agentopd.types import VersionedRecord

ActionKind = Literal["raise_share", "lower_lr", "roll_back", "replay_shares"]


class Action(VersionedRecord):
    """One thing a guard (or the budgeted policy) did: a line of ``events.jsonl``."""

    step: int
    action: ActionKind
    skill: str
    """The skill it was done for."""
    drop: float
    """How far that skill was below its base."""
    before: float
    """The value that was changed: a share, a factor on the learning rate, or a step."""
    after: float


@dataclass(frozen=True)
class GuardState:
    """Where a run stands when a guard looks at it."""

    step: int
    share: float
    rate_scale: float
    kept_step: int | None
    """The latest checkpoint that kept every skill."""


def guard_actions(
    config: GuardConfig,
    replay: ReplayConfig,
    scores: ReplayScores,
    old: Sequence[str],
    tolerated_drop: float,
    state: GuardState,
) -> list[Action]:
    """What the latest evaluation calls for, for the worst skill; empty while every skill is kept.

    Rolling back comes first, so that the raised share and the lowered rate apply to the restored student.
    """
    worst = max(old, key=scores.loss, default="")
    drop = scores.loss(worst) if worst else 0.0
    if not config.enabled or drop <= tolerated_drop:
        return []

    def action(kind: ActionKind, before: float, after: float) -> Action:
        return Action(step=state.step, action=kind, skill=worst, drop=drop, before=before, after=after)

    actions = []
    if config.roll_back is not None and drop > config.roll_back and state.kept_step is not None:
        actions.append(action("roll_back", state.step, state.kept_step))
    raised = max(state.share, min(replay.max_share, state.share * config.raise_share))
    if raised > state.share:
        actions.append(action("raise_share", state.share, raised))
    if config.lower_lr < 1:
        actions.append(action("lower_lr", state.rate_scale, state.rate_scale * config.lower_lr))
    return actions
