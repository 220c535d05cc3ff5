"""What must be kept, and what a run does to keep it: stages, tolerance, replay, guards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from agentopd.config.base import Section


class RetentionConfig(Section):
    """A suite's promise: how much of a skill may be lost."""

    baseline: str | None = None
    """The model whose scores are to be kept. Default: the first stage (a run's starting student)."""
    tasks: tuple[str, ...] = ()
    """Skills held to the promise; empty is every skill that was known before the last stage."""
    tolerated_drop: float = Field(0.02, ge=0, le=1)
    """Largest loss of success that is tolerated, as a share of 1 (0.02 is two points)."""


class StageConfig(Section):
    """One stage of a continual run: some new skills, for some steps. Skills of earlier stages are old in later ones."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    steps: int = Field(ge=1)
    """Optimiser steps; the learning-rate schedule starts anew in each stage."""
    skills: tuple[str, ...] = ()
    """Names of the suite's new skills that this stage trains. In a file, ``suite = "other.toml"`` brings its own."""
    teacher: str | None = None
    """A key of ``[teachers]`` for those of its skills that name none."""


class CoresetConfig(Section):
    """Which old tasks to replay: diverse ones near the new prompts, by sentence embeddings."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A sentence-transformers model: a directory or a Hugging Face id."""
    pool: int = Field(256, ge=2)
    """Candidate tasks per old skill, and new prompts they are compared with."""
    size: int = Field(64, ge=1)
    """Tasks kept per old skill; replay cycles through them."""
    nearness: float = Field(0.5, ge=0, le=1)
    """1 picks the tasks nearest to the new prompts, 0 the most diverse ones."""

    @model_validator(mode="after")
    def _a_choice(self) -> CoresetConfig:
        if self.size >= self.pool:
            raise ValueError(f"coreset.size {self.size} leaves nothing to choose from a pool of {self.pool}")
        return self


class ReplayConfig(Section):
    """On-policy replay of old skills: their prompts are sampled again from the current student."""

    share: float = Field(0.25, ge=0, lt=1)
    """Share of each batch's prompts drawn from old skills; 0 is off. ``budgeted`` starts from it."""
    policy: Literal["fixed", "forgetting", "budgeted", "coreset"] = "fixed"
    """``fixed``: equal shares. ``forgetting``: skill j by ``max(floor, base_j - current_j) + floor`` of the latest
    evaluation. ``budgeted``: the least share of each skill that keeps it within the suite's tolerated drop.
    ``coreset``: equal shares of tasks chosen by embeddings."""
    floor: float = Field(0.1, gt=0)
    """Of ``forgetting``: no skill is dropped."""
    min_share: float = Field(0.02, gt=0, lt=1)
    """Of ``budgeted``: the least share of one old skill; without any, nothing would notice that it fades."""
    max_share: float = Field(0.5, gt=0, lt=1)
    """Largest total share that ``budgeted`` or a guard may ask for."""
    coreset: CoresetConfig = CoresetConfig()

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> ReplayConfig:
        belongs = {"floor": "forgetting", "min_share": "budgeted", "coreset": "coreset"}
        for key, policy in belongs.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.policy != policy:
                raise ValueError(f"replay.{key} is of policy {policy!r}, and the policy is {self.policy!r}")
        if self.share == 0 and self.policy != "fixed":
            raise ValueError(f"replay.policy {self.policy!r} has nothing to share out: replay.share is 0")
        if self.policy == "budgeted" and not self.min_share <= self.share <= self.max_share:
            raise ValueError(f"replay.share {self.share} is outside [{self.min_share}, {self.max_share}]")
        return self


class GuardConfig(Section):
    """What happens when an evaluation finds an old skill beyond the suite's tolerated drop."""

    enabled: bool = False
    raise_share: float = Field(2.0, ge=1)
    """Factor on ``replay.share``, up to ``replay.max_share``; 1 is off."""
    lower_lr: float = Field(0.5, gt=0, le=1)
    """Factor on the learning rate from here on; 1 is off."""
    roll_back: float | None = Field(0.05, gt=0, le=1)
    """Drop beyond which the student returns to the last checkpoint that kept every skill; None is off."""

    @model_validator(mode="after")
    def _acts(self) -> GuardConfig:
        fields = type(self).model_fields
        for key in ("raise_share", "lower_lr", "roll_back"):
            if not self.enabled and getattr(self, key) != fields[key].default:
                raise ValueError(f"guard.{key} is set but guard.enabled is false")
        if self.enabled and self.raise_share == 1 and self.lower_lr == 1:
            raise ValueError("guard: with raise_share = 1 and lower_lr = 1 a rolled-back run would fail the same way")
        return self
