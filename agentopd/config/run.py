"""The config of a run: one TOML file, every key typed, class defaults vetted."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from agentopd.config.base import Section
from agentopd.config.decontamination import DecontaminationConfig
from agentopd.config.learner import LearnerConfig
from agentopd.config.model import ModelConfig
from agentopd.config.objective import ACCESS, Blocks, ObjectiveConfig
from agentopd.config.patience import check_patience
from agentopd.config.retention import GuardConfig, ReplayConfig, StageConfig
from agentopd.config.rollout import RolloutConfig
from agentopd.config.scaleout import RayConfig
from agentopd.config.staleness import check_staleness
from agentopd.config.suite import SkillConfig, SuiteConfig
from agentopd.config.teachers import AnyTeacherConfig, JudgeConfig, ServedTeacherConfig, TeacherConfig

__all__ = [
    "GuardConfig",
    "LearnerConfig",
    "ModelConfig",
    "ReplayConfig",
    "RolloutConfig",
    "RunConfig",
    "SkillConfig",
    "StageConfig",
    "SuiteConfig",
]


class TrainConfig(Section):
    """The schedule of a run."""

    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(48, ge=1)
    retry_share: float = Field(0.0, ge=0, lt=1)
    """Share of each new skill's prompts that are tasks it tried and did not solve, while there are any."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between retention evaluations; None evaluates at the start and the end only."""
    checkpoint_every: int | None = Field(25, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    max_staleness: int = Field(0, ge=0)
    """Updates that a token may be older than the weights it trains; 0 samples, scores and updates in turn, more
    samples that many batches ahead."""


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
    hosts: tuple[str, ...] | None = None
    """Docker engines that share the work; None is ``DOCKER_HOST``, or the local one."""
    runtime: str | None = None
    """An OCI runtime of the Docker engine, such as ``runsc``."""


class TrackingConfig(Section):
    """What a run writes besides ``metrics.jsonl``."""

    tensorboard: bool = False
    """Under ``RUN/tensorboard``."""
    wandb: bool = False
    """Weights & Biases, under ``RUN/wandb``; offline unless ``WANDB_MODE`` says otherwise."""
    trackio: bool = False
    """In trackio's own local folder."""
    episodes_per_step: int = Field(4, ge=0)
    """Episodes kept for the report at each step (the first of each skill first)."""


class DemonstrationsConfig(Section):
    """Rollouts of teachers: sampled once, judged, and kept."""

    cache: str | None = None
    """A folder to keep them in, shared between runs; None is the run's own."""


class RunConfig(Section):
    """Everything one ``agentopd train`` needs."""

    seed: int = 0
    run_dir: str = "runs/run"
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch; None leaves torch's own choice."""
    model: ModelConfig = ModelConfig()
    suite: SuiteConfig
    teachers: dict[str, AnyTeacherConfig] = Field(default_factory=dict)
    judge: JudgeConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    learner: LearnerConfig = LearnerConfig()
    replay: ReplayConfig = ReplayConfig()
    guard: GuardConfig = GuardConfig()
    stages: tuple[StageConfig, ...] = ()
    """Stages of a continual run, in order; none trains every new skill at once for ``train.steps``."""
    eval: EvalConfig = EvalConfig()
    sandbox: SandboxConfig = SandboxConfig()
    ray: RayConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: Any) -> Any:
        """Without old skills there is nothing to replay: the default share is then 0, and a given one an error.

        With stages, ``train.steps`` is the sum of theirs.
        """
        if not isinstance(data, dict) or not isinstance(data.get("suite"), dict):
            return data
        skills, stages = data["suite"].get("skills"), data.get("stages")
        skills, stages = (found if isinstance(found, list | tuple) else [] for found in (skills, stages))
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
        if self.ray is not None and self.ray.rollout_workers and self.rollout.engine != "hf":
            raise ValueError(
                f"ray.rollout_workers are 'hf' engines, and rollout.engine is {self.rollout.engine!r}: set one of them"
            )
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
        for blocks in self.objective.every_stage():
            self._teachers_suffice(blocks, new)
            if blocks.needs_groups and self.rollout.group_size < 2:
                raise ValueError("the group-relative advantage needs rollout.group_size >= 2 (it is 1)")
            self._sampler_fits(blocks)
            if blocks.needs_stored_rollouts:
                self._rollouts_can_be_stored(blocks)
        kinds = {blocks.source.kind for blocks in self.objective.every_stage()}
        if self.train.retry_share > 0 and not kinds & {"student", "mixed"}:
            raise ValueError(
                f"train.retry_share is {self.train.retry_share:g}, and with source {min(kinds)!r} the student tries "
                "nothing: set it to 0"
            )
        if any(blocks.needs_rubric for blocks in self.objective.every_stage()) != (self.judge is not None):
            lacking = (
                "verifier 'rubric' needs a model that writes rubrics and judges: add [judge] with base_url and model"
            )
            idle = "[judge] grades by rubrics, and this objective has none: leave it out"
            raise ValueError(lacking if self.judge is None else idle)
        self._views_have_effect()
        self._split_weights_suffice()
        check_staleness(self)
        check_patience(self)
        return self

    def _split_weights_suffice(self) -> None:
        """With ZeRO-3 a rank cannot use the student alone: all ranks must ask for a layer's weights at once."""
        if self.learner.zero_stage != 3:
            return
        if self.rollout.engine == "hf":
            raise ValueError(
                "learner.zero_stage 3 splits the weights that rollout.engine 'hf' samples from: use 'vllm', or stage 2"
            )
        if any(blocks.student_top_k for blocks in self.objective.every_stage()):
            raise ValueError(
                f"objective {self.objective.preset!r} asks the student for candidates, episode by episode, which "
                "learner.zero_stage 3 cannot do: use stage 2"
            )

    def _views_have_effect(self) -> None:
        """What a teacher is shown matters where it scores; where it acts, it is shown what the student would be."""
        stages = list(self.objective.every_stage())
        for name, teacher in self.teachers.items():
            if not isinstance(teacher, TeacherConfig):
                continue
            moved = {
                "context": teacher.context != "student",
                "misread_share": teacher.misread_share > 0,
                "end_of_turn": teacher.end_of_turn is not None,
            }
            for key in (key for key, is_moved in moved.items() if is_moved):
                if not any(blocks.needs_teacher for blocks in stages):
                    raise ValueError(f"teachers.{name}.{key} changes what is scored, and this objective scores nothing")
            for key in ("misread_share", "end_of_turn"):
                if moved[key] and any(blocks.needs_teacher_rollouts for blocks in stages):
                    raise ValueError(
                        f"teachers.{name}.{key} does not reach the teacher's own rollouts, which this objective "
                        "trains on: set source 'student' and anchor 'none'"
                    )

    def _rollouts_can_be_stored(self, blocks: Blocks) -> None:
        """Stored rollouts are made once: the tasks must be finite, and nothing may depend on the current student."""
        trained = [skill for skill in self.suite.skills if skill.role == "new" or self.replay.share > 0]
        for skill in trained:
            if skill.num_train_tasks is None:
                raise ValueError(
                    f"source 'offline' stores the rollouts of every training task: set num_train_tasks of skill "
                    f"{skill.name!r}"
                )
        if blocks.student_top_k:
            raise ValueError("source 'offline' has no teacher to score the current student's candidates: masks.suffix")
        if len(list(self.objective.every_stage())) > 1:
            raise ValueError("source 'offline' is a run of its own: it cannot be a stage")

    def _sampler_fits(self, blocks: Blocks) -> None:
        """The learner's log-probs are those of the whole distribution at temperature 1, the sampler's its own.

        In a nucleus their ratio is biased. At another temperature it is the importance weight that corrects for it, and
        no bound on how far the weights have moved.
        """
        rollout, bounds = self.rollout, ("tis_cap", "rejection", "max_prob_drop")
        on = [key for key in bounds if getattr(blocks.stabiliser, key) is not None]
        if rollout.top_p < 1 and blocks.has_policy_gradient and on:
            raise ValueError(
                f"rollout.top_p {rollout.top_p} renormalises the sampler's log-probs, and stabiliser.{on[0]} "
                f"compares them with the learner's: set objective.stabiliser.{on[0]} = 'none', or top_p = 1"
            )
        if rollout.temperature == 1 or not blocks.has_policy_gradient:
            return
        if on and on[-1] != "tis_cap":
            raise ValueError(
                f"stabiliser.{on[-1]} compares log-probs of the sampler, at rollout.temperature "
                f"{rollout.temperature:g}, with the learner's at 1: set objective.stabiliser.{on[-1]} = 'none', or "
                "temperature = 1"
            )
        if not on:
            raise ValueError(
                f"at rollout.temperature {rollout.temperature:g} samples are not the policy's, and nothing corrects "
                "for it: set objective.stabiliser.tis_cap, or temperature = 1"
            )

    def _teachers_suffice(self, blocks: Blocks, new: list[SkillConfig]) -> None:
        """Every new skill has a teacher, and it gives what these blocks read."""
        needed = blocks.teacher_access
        if needed == "none":
            return
        for skill in new:
            teacher = self.teachers.get(self.teacher_of(skill) or "default")
            if teacher is None:
                raise ValueError(
                    f"objective {self.objective.preset!r} needs a teacher for skill {skill.name!r}: "
                    "add [teachers.default] with a model, or name one in the skill"
                )
            if ACCESS.index(teacher.access) < ACCESS.index(needed):
                raise ValueError(
                    f"objective {self.objective.preset!r} needs a teacher that gives {needed!r}; "
                    f"the one of skill {skill.name!r} gives {teacher.access!r} only"
                )
            acts = blocks.needs_teacher_rollouts or blocks.alignment.kind != "same"
            if isinstance(teacher, ServedTeacherConfig) and acts:
                raise ValueError(
                    f"objective {self.objective.preset!r} needs a teacher that acts, or one with a tokenizer of its "
                    f"own; the one of skill {skill.name!r} is served, and only scores: use kind = 'hf'"
                )
            reads_base = blocks.needs_reference and blocks.reference.policy == "teacher_base"
            if reads_base and getattr(teacher, "base", None) is None:
                raise ValueError(
                    f"reference.policy 'teacher_base' needs the model that the teacher of skill {skill.name!r} was "
                    "trained from: set 'base' beside its 'model', or use reference.policy = 'start'"
                )

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
