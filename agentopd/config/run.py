"""The config of a run: one TOML file, every key typed, class defaults vetted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentopd.config.base import OFF, Section
from agentopd.config.objective import ObjectiveConfig
from agentopd.types import Limits

Dtype = Literal["auto", "bfloat16", "float32"]
"""``auto``: bfloat16 on accelerators and on CPUs that compute in it, float32 on other CPUs, where bfloat16 is slow."""


class SkillConfig(Section):
    """One entry of a suite: an environment, where its tasks come from, and the part it plays."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Keys every metric: ``<name>/success``."""
    env: str
    """A registered environment or ``file.py:Class``."""
    source: str = "micro"
    """Which of the environment's task sources to draw from."""
    role: Literal["new", "old"] = "new"
    """``new`` skills are trained; ``old`` ones are replayed and must be kept."""
    weight: float = Field(1.0, gt=0)
    teacher: str | None = None
    """A key of ``[teachers]``. Default: ``default`` for new skills, the frozen starting student for old ones."""
    verifier: str | None = None
    """Overrides the environment's own verifier."""
    num_train_tasks: int | None = Field(None, ge=1)
    """Cap on distinct training tasks; None takes what the source has (a procedural source has no end)."""
    limits: Limits | None = None
    """Overrides the tasks' own limits."""

    @field_validator("limits", mode="before")
    @classmethod
    def _limits_left_open(cls, data: Any) -> Any:
        """``Limits`` is a record, not a section: a limit spelled "none" is one that is left out."""
        return {key: value for key, value in data.items() if value != OFF} if isinstance(data, dict) else data


class SuiteConfig(Section):
    """The skills of a run or an evaluation."""

    name: str = "suite"
    skills: tuple[SkillConfig, ...] = ()

    @model_validator(mode="after")
    def _sane(self) -> SuiteConfig:
        names = [skill.name for skill in self.skills]
        if not names:
            raise ValueError("the suite is empty: add at least one [[skills]] entry")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two skills are named {name!r}; metrics are keyed by name, so rename one")
        return self


class ModelConfig(Section):
    """The student."""

    student: str = "micro/student"
    """A directory, a Hugging Face id, or a checkpoint shipped with AgentOPD (``micro/student``)."""
    dtype: Dtype = "auto"


class TeacherConfig(Section):
    """One teacher."""

    kind: Literal["hf"] = "hf"
    model: str
    dtype: Dtype = "auto"
    batch_tokens: int = Field(16384, ge=256)


class RolloutConfig(Section):
    """How episodes are sampled."""

    engine: Literal["hf"] = "hf"
    group_size: int = Field(4, ge=1)
    """Episodes per prompt."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    batch_size: int = Field(256, ge=1)
    """Sequences decoded at once by the in-process engine."""
    turn_cache_mb: int = Field(1024, ge=0)
    """Memory for keys and values kept between the turns of an episode; 0 prefills the whole prompt every turn."""
    codec: str = "hermes_json"
    max_malformed: int = Field(3, ge=1)
    """Malformed tool calls that end an episode."""


class TrainConfig(Section):
    """The schedule of a run."""

    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(48, ge=1)
    eval_every: int | None = Field(None, ge=1)
    """Steps between retention evaluations; None evaluates at the start and the end only."""
    checkpoint_every: int | None = Field(25, ge=1)
    keep_checkpoints: int = Field(2, ge=1)


class LearnerConfig(Section):
    """The optimiser. Compute is in the model's dtype, master weights and log-prob arithmetic in fp32."""

    lr: float = Field(5e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(5, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(8192, ge=128)
    """Padded tokens in one forward pass; sequences are bucketed by length."""
    epochs: int = Field(1, ge=1)
    """Optimiser passes over each batch."""
    max_epoch_kl: float = Field(0.1, gt=0)
    """Stop further passes once mean |logprobs - old_logprobs| exceeds this."""
    zero_stage: Literal[0, 1, 2] = 0
    """How much optimiser state is split over ranks. A bfloat16 student with 0 runs as 1: the same thing on one rank,
    and the stage that keeps fp32 gradients."""


class ReplayConfig(Section):
    """On-policy replay of old skills: their prompts are sampled again from the current student."""

    share: float = Field(0.25, ge=0, lt=1)
    """Share of each batch's prompts drawn from old skills; 0 is off."""
    policy: Literal["fixed", "forgetting"] = "forgetting"
    """``forgetting`` draws skill j with weight ``max(floor, base_j - current_j) + floor``."""
    floor: float = Field(0.1, gt=0)


class EvalConfig(Section):
    """Evaluations during and around training."""

    tasks_per_skill: int = Field(100, ge=1)
    k: int = Field(1, ge=1)
    """Attempts per task (avg@k, pass@k)."""
    temperature: float = Field(1.0, ge=0)
    seed: int = 1234


class SandboxConfig(Section):
    """Where programs are judged."""

    backend: str = "jail"
    workers: int | None = Field(None, ge=1)
    """Concurrent cases; None is the number of CPU cores."""
    wall_s: float = Field(5.0, gt=0)
    memory_mb: int = Field(512, ge=64)
    hosts: tuple[str, ...] | None = None
    """Docker engines that share the work; None is ``DOCKER_HOST``, or the local one."""
    runtime: str | None = None
    """An OCI runtime of the Docker engine, such as ``runsc``."""


class TrackingConfig(Section):
    """What a run writes besides ``metrics.jsonl``."""

    tensorboard: bool = False
    episodes_per_step: int = Field(4, ge=0)
    """Episodes kept for the report at each step (the first of each skill first)."""


class RunConfig(Section):
    """Everything one ``agentopd train`` needs."""

    seed: int = 0
    run_dir: str = "runs/run"
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; None leaves torch's own choice."""
    model: ModelConfig = ModelConfig()
    suite: SuiteConfig
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    objective: ObjectiveConfig = ObjectiveConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    eval: EvalConfig = EvalConfig()
    sandbox: SandboxConfig = SandboxConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_replay_without_old_skills(cls, data: Any) -> Any:
        """A suite without old skills has nothing to replay: the default share is then 0, and a given one an error."""
        if not isinstance(data, dict) or not isinstance(data.get("suite"), dict):
            return data
        skills = data["suite"].get("skills") or []
        if any(isinstance(skill, dict) and skill.get("role") == "old" for skill in skills):
            return data
        replay = data.get("replay") or {}
        if isinstance(replay, dict) and "share" not in replay:
            return {**data, "replay": {**replay, "share": 0.0}}
        return data

    @model_validator(mode="after")
    def _inputs_present(self) -> RunConfig:
        """Every combination that lacks an input is refused here, before anything is loaded."""
        new = [skill for skill in self.suite.skills if skill.role == "new"]
        if not new:
            raise ValueError("no skill has role 'new': there is nothing to train")
        if self.replay.share > 0 and len(new) == len(self.suite.skills):
            raise ValueError(
                f"replay.share is {self.replay.share} but no skill has role 'old': add one, or set it to 0"
            )
        for skill in self.suite.skills:
            if skill.teacher is not None and skill.teacher not in self.teachers:
                known = ", ".join(sorted(self.teachers)) or "none"
                raise ValueError(f"skill {skill.name!r} names teacher {skill.teacher!r}; [teachers] has: {known}")
        if self.objective.needs_teacher and "default" not in self.teachers:
            lacking = [skill.name for skill in new if skill.teacher is None]
            if lacking:
                raise ValueError(
                    f"objective {self.objective.preset!r} needs a teacher for skill {lacking[0]!r}: "
                    "add [teachers.default] with a model, or name one in the skill"
                )
        if self.objective.verifier.kind == "grpo" and self.rollout.group_size < 2:
            raise ValueError("the group-relative advantage needs rollout.group_size >= 2 (it is 1)")
        return self
