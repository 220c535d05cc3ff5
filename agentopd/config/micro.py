"""The recipe of ``agentopd micro build``: tokenizer, architecture and supervised stages, from procedural data only."""

from __future__ import annotations

from pydantic import Field, model_validator

from agentopd.config.base import Section
from agentopd.config.run import EvalConfig, LearnerConfig, SuiteConfig


class TokenizerRecipe(Section):
    """Byte-level BPE with single digits, trained on gold trajectories of every skill."""

    vocab_size: int = Field(512, ge=300)
    tasks_per_skill: int = Field(2000, ge=1)


class ArchitectureRecipe(Section):
    """A Qwen3 architecture with tied embeddings."""

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    max_context: int = 1024
    rope_theta: float = 10000.0


class StageRecipe(Section):
    """One supervised stage; it continues from the stage before."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    mix: dict[str, float]
    """Share of the loss (and of the prompts) by skill; shares are normalised."""
    learner: LearnerConfig = LearnerConfig()
    export: bool = False
    """Write this stage's model as ``<out>/<name>``."""
    expect: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Success each skill must land in, ``[low, high]``; the build fails outside it."""


class MicroRecipe(Section):
    """Everything ``agentopd micro build`` needs."""

    seed: int = 0
    out: str
    work_dir: str
    checkpoint_every: int = Field(100, ge=1)
    threads: int | None = Field(None, ge=1)
    suite: SuiteConfig
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    architecture: ArchitectureRecipe = ArchitectureRecipe()
    stages: tuple[StageRecipe, ...]
    eval: EvalConfig = EvalConfig(tasks_per_skill=200)

    @model_validator(mode="after")
    def _stages_name_skills(self) -> MicroRecipe:
        known = [skill.name for skill in self.suite.skills]
        if not self.stages:
            raise ValueError("the recipe has no [[stages]]")
        for stage in self.stages:
            for name in [*stage.mix, *stage.expect]:
                if name not in known:
                    raise ValueError(f"stage {stage.name!r} names skill {name!r}; the suite has: {', '.join(known)}")
        return self
