"""What a comparison consists of: every run with its resolved config, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentopd.config import PRESETS, RunConfig, load_run_config
from agentopd.config.comparison import ArmConfig, ComparisonConfig
from agentopd.config.load import load_section
from agentopd.errors import ConfigError
from agentopd.models import model_hash

START = "start"
_DECIDES_NOTHING: dict[str, Any] = {"run_dir": True, "tracking": True, "learner": {"collective_timeout_s"}}
"""Keys of a run that its figures do not depend on."""
_CAME_LATER: dict[tuple[str, str], Any] = {("rollout", "cut_turns"): False}
"""Options that older results know nothing of, by section and key, and the value that is what was done before them."""


@dataclass(frozen=True)
class PlannedRun:
    """One arm at one seed, or the run that makes the starting student."""

    arm: str
    seed: int
    config: RunConfig

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """For messages and file names."""
        return f"{self.arm}-seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison ready to run."""

    comparison: ComparisonConfig
    out: Path
    runs: tuple[PlannedRun, ...]
    """Seed by seed, so that an interrupted comparison has whole seeds to compare."""
    base: Path
    """The run config that every arm changes."""
    start: PlannedRun | None = None
    record: Path | None = None
    """Results of earlier sittings."""

    def planned(self, arm: str, seed: int) -> PlannedRun:
        """The run of an arm at a seed, with its resolved config. Raises ``ConfigError``."""
        chosen, student = self.comparison.arms[arm], self.start and f"model.student={self.start.path / 'model'}"
        # Shared overrides come after the arm's preset, which starts the objective afresh, and before the arm's own.
        preset = [f"objective.preset={chosen.preset}"] if chosen.preset else []
        shared = [*self.comparison.set, *([student] if student else [])]
        given = [*preset, *shared, *chosen.set, f"seed={seed}", f"run_dir={self.out / arm / f'seed-{seed}'}"]
        try:
            return PlannedRun(arm, seed, load_run_config(self.base, given))
        except ConfigError as exc:
            raise ConfigError(f"arm {arm!r}: {exc}") from None

    def preset_of(self, arm: str) -> str:
        """The preset that an arm's objective is made from."""
        return self.planned(arm, self.comparison.seeds_of(arm)[0]).config.objective.preset

    def fingerprint(self, run: PlannedRun) -> str:
        """Digest of what decides a run's figures: its config, and the weights or the run that its models come from.

        What is not set is left out: a later version's new options do not make the results of this one another's.
        """
        config = run.config.model_dump(mode="json", exclude=_DECIDES_NOTHING, exclude_none=True)
        for (section, key), before in _CAME_LATER.items():
            if config[section][key] == before:
                del config[section][key]
        if self.start is not None and run is not self.start:
            config["model"]["student"] = self.fingerprint(self.start)
        else:
            config["model"]["student"] = model_hash(run.config.model.student)
        for name, teacher in config["teachers"].items():
            if "model" in teacher:
                config["teachers"][name]["model"] = model_hash(teacher["model"])
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(path: Path, arms: Sequence[str] = (), num_seeds: int | None = None) -> Plan:
    """Read a comparison file and resolve the config of every run. Raises ``ConfigError`` before anything is loaded.

    ``arms`` picks some of its arms, ``num_seeds`` the first few seeds of each. A run config in place of a comparison
    file is compared as it stands: ``arms`` are then names of presets.
    """
    comparison = _read(path, arms)
    here = path.parent
    out = Path(comparison.out)
    start = None
    if comparison.start is not None:
        given = [*comparison.start.set, f"run_dir={out / START}"]
        made = load_run_config(_beside(here, comparison.start.config), given)
        start = PlannedRun(START, made.seed, made)
    record = here / comparison.record if comparison.record else None
    plan = Plan(comparison, out, (), _beside(here, comparison.config), start, record)
    chosen = list(arms) or list(comparison.arms)
    pairs = [(arm, seed) for arm in chosen for seed in comparison.seeds_of(arm)[:num_seeds]]
    order = {pair: (comparison.seeds_of(pair[0]).index(pair[1]), index) for index, pair in enumerate(pairs)}
    runs = [plan.planned(*pair) for pair in sorted(pairs, key=lambda pair: order[pair])]
    return replace(plan, runs=tuple(runs))


def _read(path: Path, arms: Sequence[str]) -> ComparisonConfig:
    if path.is_file() and "arms" not in _keys(path):
        if not arms:
            raise ConfigError(f"{path} has no [arms]: add some, or name presets with --arms opd,grpo")
        unknown = [arm for arm in arms if arm not in PRESETS]
        if unknown:
            raise ConfigError(f"--arms {unknown[0]}: not a preset, and {path} has no [arms]")
        presets = {name: ArmConfig(preset=name) for name in arms}
        return ComparisonConfig(name=path.stem, config=path.name, out=f"runs/compare-{path.stem}", arms=presets)
    comparison = load_section(ComparisonConfig, path)
    for arm in arms:
        if arm not in comparison.arms:
            raise ConfigError(f"--arms {arm}: no such arm; {path} has: {', '.join(comparison.arms)}")
    return comparison


def _keys(path: Path) -> set[str]:
    try:
        return set(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from None


def _beside(folder: Path, name: str) -> Path:
    near = folder / name
    return near if near.exists() else Path(name)
