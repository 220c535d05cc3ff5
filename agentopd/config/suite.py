"""The config of a suite: which skills there are, where their tasks come from, and what must be kept."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentopd.config.base import OFF, Section
from agentopd.config.retention import RetentionConfig
from agentopd.types import Limits

SkillRole = Literal["new", "old"]


class CurriculumConfig(Section):
    """Tasks by difficulty: the easiest share grows as sqrt, from ``start`` to all (Platanios et al. 2019)."""

    start: float = Field(0.3, gt=0, le=1)
    """Share of the tasks on offer at first."""
    tasks: int = Field(2000, ge=1)
    """Tasks drawn until all are on offer."""


class SkillConfig(Section):
    """One entry of a suite: an environment, where its tasks come from, and the part it plays."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Keys every metric: ``<name>/success``."""
    env: str
    """A registered environment or ``file.py:Class``."""
    source: str = "micro"
    """Which of the environment's task sources to draw from."""
    role: SkillRole = "new"
    """``new`` skills are trained; ``old`` ones are replayed and must be kept."""
    weight: float = Field(1.0, gt=0)
    """Share among the new skills; old ones share what ``[replay]`` gives them."""
    teacher: str | None = None
    """A key of ``[teachers]``. Default: ``default`` for new skills, the frozen starting student for old ones."""
    verifier: str | None = None
    """Overrides the environment's own verifier."""
    num_train_tasks: int | None = Field(None, ge=1)
    """Cap on distinct training tasks; None takes what the source has (a procedural source has no end)."""
    limits: Limits | None = None
    """Overrides the tasks' own limits."""
    curriculum: CurriculumConfig | None = None
    """Easy tasks first; None takes tasks as they come."""
    max_live: int | None = Field(None, ge=1)
    """Episodes of this skill that may be under way at once."""
    own_batches: bool = False
    """Decode its episodes apart from the others', which then need not wait for a slow environment."""

    @model_validator(mode="after")
    def _weight_is_read(self) -> SkillConfig:
        if self.role == "old" and self.weight != 1.0:
            raise ValueError(
                f"skill {self.name!r} is old, and weight {self.weight:g} is for new skills: old ones get replay.share, "
                "which replay.policy divides"
            )
        return self

    @field_validator("limits", mode="before")
    @classmethod
    def _limits_left_open(cls, data: Any) -> Any:
        """``Limits`` is a record, not a section: a limit spelled "none" is one that is left out."""
        return {key: value for key, value in data.items() if value != OFF} if isinstance(data, dict) else data


class SuiteConfig(Section):
    """The skills of a run or an evaluation."""

    name: str = "suite"
    seed: int | None = None
    """Fixes tasks and their order whatever the run's seed; None takes the run's."""
    temperature: float | None = Field(None, gt=0)
    """Shares of the new skills by their number of tasks to the power 1/temperature, instead of by weight."""
    skills: tuple[SkillConfig, ...] = ()
    retention: RetentionConfig | None = None
    """How much may be lost; declared, `agentopd retention` fails where it is broken."""

    @model_validator(mode="after")
    def _sane(self) -> SuiteConfig:
        names = [skill.name for skill in self.skills]
        if not names:
            raise ValueError("the suite is empty: add at least one [[skills]] entry")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two skills are named {name!r}; metrics are keyed by name, so rename one")
        for name in self.retention.tasks if self.retention else ():
            if name not in names:
                raise ValueError(f"retention.tasks names skill {name!r}; the suite has: {', '.join(names)}")
        weighted = [skill.name for skill in self.skills if "weight" in skill.model_fields_set and skill.weight != 1.0]
        if self.temperature is not None and weighted:
            raise ValueError(f"give either temperature or weights: skill {weighted[0]!r} has a weight")
        return self
