"""A comparison as data: one run config, several arms that change it, seeds. ``agentopd compare`` reads it."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from agentopd.config.base import Section

NAME = r"^[A-Za-z0-9_.+-]+$"


def _toml(value: Any) -> str:
    """A value in one line of TOML, as ``--set`` reads it back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table_or_list(data: Any) -> Any:
    return tuple(f"{key}={_toml(value)}" for key, value in data.items()) if isinstance(data, dict) else data


Overrides = Annotated[tuple[str, ...], BeforeValidator(_table_or_list)]
"""``key=value`` strings, or a table of dotted keys."""


class ArmConfig(Section):
    """One way of training: a preset, dotted overrides of the run config, or both."""

    preset: str | None = None
    """Starts from this preset's own blocks, whatever the run config chose."""
    set: Overrides = ()
    """``key=value`` as after ``--set``; a table of dotted keys is the same."""
    seeds: tuple[int, ...] = ()
    """Default: the comparison's."""


class StartConfig(Section):
    """A run whose final model is every arm's starting student; trained first where it is missing."""

    config: str
    set: Overrides = ()


class ComparisonConfig(Section):
    """Everything one ``agentopd compare`` needs. Paths are relative to the file."""

    name: str = Field(pattern=NAME)
    config: str
    """The run config that every arm changes."""
    out: str
    """Where the runs and the results go, one directory a run; a second start continues there."""
    record: str | None = None
    """A file of results to keep with the project, beside this one or by path from it. A run in it counts as finished
    while its config and models are the same, whatever machine it ran on; finished runs are added."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds. Held-out tasks are the same for every arm and seed."""
    set: Overrides = ()
    """Overrides for every arm, applied before its own."""
    arms: dict[str, ArmConfig]
    baseline: str | None = None
    """The arm that the others are tested against. Default: the first."""
    start: StartConfig | None = None
    jobs: int | None = Field(None, ge=1)
    """Runs at once; None is CPU cores over threads of a run."""

    @model_validator(mode="after")
    def _sane(self) -> ComparisonConfig:
        if not self.arms:
            raise ValueError("a comparison needs arms: add [arms.NAME] with a preset or overrides")
        for name, arm in self.arms.items():
            if not name.replace("_", "").replace("-", "").replace(".", "").replace("+", "").isalnum():
                raise ValueError(f"arm {name!r}: use letters, digits and _ . + - (it names a directory)")
            if name == START_ARM:
                raise ValueError(f"arm {name!r}: that name is the untrained student's, and always in the table")
            seeds = arm.seeds or self.seeds
            if not seeds or len(dict.fromkeys(seeds)) < len(seeds):
                raise ValueError(f"arm {name!r} needs distinct seeds, got {list(seeds)}")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is no arm; arms: {', '.join(self.arms)}")
        return self

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds of an arm."""
        return self.arms[arm].seeds or self.seeds

    @property
    def tested_against(self) -> str:
        """The baseline arm."""
        return self.baseline or next(iter(self.arms))


START_ARM = "base"
"""The untrained student's row: its scores come from the evaluation with which every run begins."""
