"""What sampling ahead of the update asks of the rest of a run's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentopd.config.run import RunConfig


def check_staleness(config: RunConfig) -> None:
    """Older samples are the student's own and are corrected, and what cuts turns meets some. Raises ``ValueError``."""
    if config.rollout.cut_turns:
        _updates_meet_turns(config)
    for blocks in config.objective.every_stage() if config.train.max_staleness else ():
        if blocks.source.kind in ("gold", "teacher", "offline"):
            raise ValueError(f"train.max_staleness is about the student's samples; source is {blocks.source.kind!r}")
        if blocks.stabiliser.tis_cap is None and blocks.stabiliser.rejection is None:
            raise ValueError(
                "train.max_staleness trains on samples of older weights, which nothing corrects: set "
                "objective.stabiliser.tis_cap, or max_staleness = 0"
            )


def _updates_meet_turns(config: RunConfig) -> None:
    if not config.train.max_staleness:
        raise ValueError(
            "rollout.cut_turns has no effect where no turn is under way at an update: set train.max_staleness, or "
            "leave it out"
        )
    if config.ray is not None and config.ray.rollout_workers:
        raise ValueError(
            "rollout.cut_turns has no effect on ray.rollout_workers, which take up weights between turns and keep "
            "nobody waiting: leave it out"
        )
