"""Results kept with the project, so that a comparison of many hours may be run in many sittings, on many machines."""

from __future__ import annotations

from pydantic import ValidationError

from agentopd.compare.plan import Plan
from agentopd.compare.records import Results, SeedResult
from agentopd.config.comparison import START_ARM
from agentopd.errors import ConfigError
from agentopd.tracking import user_errors, write_atomic

Key = tuple[str, int]
"""Arm and seed."""


def recorded(plan: Plan) -> dict[Key, SeedResult]:
    """What the record has of this comparison as it is now: runs of another config, arm or seed are left out.

    Raises ``ConfigError`` for a file that is no record.
    """
    if plan.record is None or not plan.record.is_file():
        return {}
    try:
        stored = Results.model_validate_json(plan.record.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ConfigError(f"record {str(plan.record)!r} holds no results of a comparison: move it away") from None
    found = {
        (name, item.seed): item
        for name, arm in stored.arms.items()
        for item in arm.seeds
        if name in plan.comparison.arms and item.config == plan.fingerprint(plan.planned(name, item.seed))
    }
    seeds = {seed for _, seed in found}
    untrained = stored.arms[START_ARM].seeds if START_ARM in stored.arms else ()
    return {**found, **{(START_ARM, item.seed): item for item in untrained if item.seed in seeds}}


def write_record(plan: Plan, results: Results) -> None:
    """Keep ``results`` for the next sitting."""
    if plan.record is not None:
        with user_errors(plan.record):
            plan.record.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(plan.record, results.model_dump_json(indent=1) + "\n")
