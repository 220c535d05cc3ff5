"""The config of a run: one TOML file, every key typed, class defaults vetted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from agentopd.config.base import OFF, Section
from agentopd.config.objective import ObjectiveConfig
from agentopd.config.retention import GuardConfig, ReplayConfig, RetentionConfig, StageConfig
from agentopd.types import Limits

__all__ = ["GuardConfig", "ReplayConfig", "RetentionConfig", "RunConfig", "SkillConfig", "StageConfig", "SuiteConfig"]

SkillRole = Literal["new", "old"]
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
    role: SkillRole = "new"
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


class EvalConfig(Section):
    """Evaluations during and around training."""

    tasks_per_skill: int = Field(100, ge=1)
    k: int = Field(1, ge=1)
    """Attempts per task (avg@k, pass@k)."""
    temperature: float = Field(1.0, ge=0)
    seed: int = 1234
    start_kl: bool | None = None
    """Measure KL(student, starting student) on the held-out episodes, by the log-probs of what was sampled; holds the
    starting student in memory. None measures it where ``temperature`` is 1: other samples are not the policy's."""

    @model_validator(mode="after")
    def _kl_needs_samples_of_the_policy(self) -> EvalConfig:
        if self.start_kl and self.temperature != 1:
            raise ValueError(f"start_kl needs temperature 1 (it is {self.temperature}): leave one of them out")
        return self

    @property
    def measures_kl(self) -> bool:
        """Whether evaluations score their episodes under the starting student."""
        return self.temperature == 1 if self.start_kl is None else self.start_kl


class SandboxConfig(Section):
    """Where programs are judged."""

    backend: str = "jail"
    workers: int | None = Field(None, ge=1)
    """Concurrent cases; None is the number of CPU cores."""
    wall_s: float = Field(5.0, gt=0)
    memory_mb: int = Field(512, ge=64)


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
    guard: GuardConfig = GuardConfig()
    stages: tuple[StageConfig, ...] = ()
    """Stages of a continual run, in order; none trains every new skill at once for ``train.steps``."""
    eval: EvalConfig = EvalConfig()
    sandbox: SandboxConfig = SandboxConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """Without old skills there is nothing to replay: the default share is then 0, and a given one an error.

        With stages, ``train.steps`` is the sum of theirs.
        """
        if not isinstance(data, dict) or not isinstance(data.get("suite"), dict):
            return data
        skills = data["suite"].get("skills") or []
        stages = data.get("stages") or []
        has_old = any(isinstance(skill, dict) and skill.get("role") == "old" for skill in skills)
        replay, train = data.get("replay") or {}, data.get("train") or {}
        if not has_old and len(stages) < 2 and isinstance(replay, dict) and "share" not in replay:
            data = {**data, "replay": {**replay, "share": 0.0}}
        steps = [stage.get("steps") for stage in stages if isinstance(stage, dict)]
        if stages and all(isinstance(num, int) for num in steps) and isinstance(train, dict) and "steps" not in train:
            data = {**data, "train": {**train, "steps": sum(num for num in steps if isinstance(num, int))}}
        return data

    @model_validator(mode="after")
    def _inputs_present(self) -> RunConfig:
        """Every combination that lacks an input is refused here, before anything is loaded."""
        new = [skill for skill in self.suite.skills if skill.role == "new"]
        if not new:
            raise ValueError("no skill has role 'new': there is nothing to train")
        if self.replay.share > 0 and len(new) == len(self.suite.skills) and len(self.stages) < 2:
            raise ValueError(
                f"replay.share is {self.replay.share} but no skill has role 'old': add one, or set it to 0"
            )
        for skill in self.suite.skills:
            key = self.teacher_of(skill)
            if key is not None and key not in self.teachers:
                known = ", ".join(sorted(self.teachers)) or "none"
                raise ValueError(f"skill {skill.name!r} names teacher {key!r}; [teachers] has: {known}")
        if self.objective.needs_teacher and "default" not in self.teachers:
            lacking = [skill.name for skill in new if self.teacher_of(skill) is None]
            if lacking:
                raise ValueError(
                    f"objective {self.objective.preset!r} needs a teacher for skill {lacking[0]!r}: "
                    "add [teachers.default] with a model, or name one in the skill"
                )
        if self.objective.verifier.kind == "grpo" and self.rollout.group_size < 2:
            raise ValueError("the group-relative advantage needs rollout.group_size >= 2 (it is 1)")
        return self

    @model_validator(mode="after")
    def _stages_cover_the_new_skills(self) -> RunConfig:
        if not self.stages:
            return self
        names = [stage.name for stage in self.stages]
        new = [skill.name for skill in self.suite.skills if skill.role == "new"]
        taught = [name for stage in self.stages for name in stage.skills]
        for stage in self.stages:
            if names.count(stage.name) > 1:
                raise ValueError(
                    f"two stages are named {stage.name!r}; evaluations are named after them, so rename one"
                )
            if not stage.skills:
                raise ValueError(f"stage {stage.name!r} trains nothing: give it skills, or a suite")
        for name in taught:
            if name not in new:
                raise ValueError(f"stages name skill {name!r}; the suite's new skills are: {', '.join(new)}")
            if taught.count(name) > 1:
                raise ValueError(f"skill {name!r} is in two stages; it is replayed after its first")
        for name in new:
            if name not in taught:
                raise ValueError(f"no stage trains the new skill {name!r}: add it to one, or make its role 'old'")
        total = sum(stage.steps for stage in self.stages)
        if self.train.steps != total:
            raise ValueError(f"train.steps is {self.train.steps} but the stages take {total}: leave it out")
        return self

    @model_validator(mode="after")
    def _reactions_have_something_to_react_to(self) -> RunConfig:
        """A policy or guard that acts on evaluations needs some between the first and the last, and a tolerance."""
        most_old = max(len(self.old_at(step)) for step in (0, self.train.steps - 1))
        reacting = [f"replay.policy {self.replay.policy!r}"] if self.replay.policy in ("forgetting", "budgeted") else []
        reacting += ["guard.enabled"] if self.guard.enabled else []
        for what in reacting:
            if self.train.eval_every is None and len(self.stages) < 2:
                raise ValueError(f"{what} acts on evaluations during the run: set train.eval_every")
            if most_old == 0:
                raise ValueError(f"{what} keeps old skills, and no skill has role 'old'")
        if self.replay.policy == "forgetting" and most_old == 1:
            raise ValueError(
                "replay.policy 'forgetting' divides replay among old skills, and there is one: use 'fixed'"
            )
        if self.replay.policy == "budgeted" and self.guard.enabled and self.guard.raise_share != 1:
            raise ValueError("replay.policy 'budgeted' sets the shares itself: set guard.raise_share = 1")
        if self.guard.enabled and self.guard.raise_share != 1 and self.replay.share == 0:
            raise ValueError("guard.raise_share raises replay.share, which is 0: set one of them")
        if self.suite.retention is None and (self.guard.enabled or self.replay.policy == "budgeted"):
            raise ValueError("how much may be lost? declare suite.retention.tolerated_drop")
        declared = self.suite.retention
        if declared is not None and declared.baseline not in (None, self.model.student):
            raise ValueError(
                f"suite.retention.baseline is {declared.baseline!r} but the run starts from {self.model.student!r}: "
                "start from the baseline, or leave it out"
            )
        return self

    def teacher_of(self, skill: SkillConfig) -> str | None:
        """The key of ``[teachers]`` that a skill, or the stage that trains it, names."""
        stage = next((stage for stage in self.stages if skill.name in stage.skills), None)
        return skill.teacher or (stage.teacher if stage else None)

    def stage_at(self, step: int) -> int:
        """Index of the stage that trains after ``step`` finished steps; the last one at the end."""
        done = 0
        for index, stage in enumerate(self.stages):
            done += stage.steps
            if step < done:
                return index
        return max(0, len(self.stages) - 1)

    def new_at(self, step: int) -> tuple[str, ...]:
        """Skills trained after ``step`` finished steps."""
        if self.stages:
            return self.stages[self.stage_at(step)].skills
        return tuple(skill.name for skill in self.suite.skills if skill.role == "new")

    def old_at(self, step: int) -> tuple[str, ...]:
        """Skills to keep after ``step`` finished steps: those of the start, and those of earlier stages."""
        old = tuple(skill.name for skill in self.suite.skills if skill.role == "old")
        earlier = self.stages[: self.stage_at(step)] if self.stages else ()
        return old + tuple(name for stage in earlier for name in stage.skills)
