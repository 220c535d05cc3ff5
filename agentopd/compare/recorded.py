"""Results kept with the project, so that a comparison of many hours may be run in many sittings, on many machines."""

from __future__ import annotations

from pydantic import ValidationError

from agentopd.compare.plan import Plan
from agentopd.compare.records import ArmResult, Results, SeedResult
from agentopd.config.comparison import START_ARM
from agentopd.errors import ConfigError
from agentopd.tracking import user_errors, write_atomic

Key = tuple[str, int]
"""Arm and seed."""


def recorded(plan: Plan) -> dict[Key, SeedResult]:
    """What the record has of this comparison as it is now: runs of another config, arm or seed are left out.

    Raises ``ConfigError`` for a file that is no record.
    """
    stored = _stored(plan)
    found = {
        (name, item.seed): item
        for name, arm in stored.items()
        for item in arm.seeds
        if name in plan.comparison.arms and item.config == plan.fingerprint(plan.planned(name, item.seed))
    }
    seeds = {seed for _, seed in found}
    untrained = stored[START_ARM].seeds if START_ARM in stored else ()
    return {**found, **{(START_ARM, item.seed): item for item in untrained if item.seed in seeds}}


def left_out(plan: Plan) -> list[str]:
    """Names of the runs in the record that are not of this comparison as it is now."""
    known = recorded(plan)
    every = [(name, item.seed) for name, arm in _stored(plan).items() for item in arm.seeds if name != START_ARM]
    return [f"{name}-seed-{seed}" for name, seed in every if (name, seed) not in known]


def write_record(plan: Plan, results: Results) -> None:
    """Keep ``results`` for the next sitting, and what the record has of other configs until their runs are here."""
    if plan.record is None:
        return
    arms = dict(results.arms)
    for name, arm in _stored(plan).items():
        here = arms.get(name, ArmResult(seeds=(), preset=arm.preset))
        rest = [item for item in arm.seeds if item.seed not in {known.seed for known in here.seeds}]
        arms[name] = here.model_copy(update={"seeds": tuple(sorted([*here.seeds, *rest], key=lambda item: item.seed))})
    with user_errors(plan.record):
        plan.record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(plan.record, results.model_copy(update={"arms": arms}).model_dump_json(indent=1) + "\n")


def _stored(plan: Plan) -> dict[str, ArmResult]:
    if plan.record is None or not plan.record.is_file():
        return {}
    try:
        return dict(Results.model_validate_json(plan.record.read_text(encoding="utf-8")).arms)
    except (ValidationError, UnicodeDecodeError):
        raise ConfigError(f"record {str(plan.record)!r} holds no results of a comparison: move it away") from None
