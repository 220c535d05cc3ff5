"""A run: its live parts, where it stands, and what it leaves on disk."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from agentopd.build import Judge, Policy, Skill, build_policy, build_sandbox, load_skills
from agentopd.certify import require_certificates
from agentopd.checkpoint import has_checkpoint, latest_kept_step, load_latest, load_step, save_checkpoint
from agentopd.config import RunConfig, dump_toml, load_run_config
from agentopd.config.objective import Blocks
from agentopd.config.teachers import TeacherConfig
from agentopd.contracts import ScoredEpisode
from agentopd.errors import UserError
from agentopd.evaluate import Judged, evaluate_model, heldout_tasks, start_kl, summarise
from agentopd.evaluation.metrics import EvalResult, SkillScore
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.mixture import (
    Action,
    CoresetStream,
    Decontaminator,
    Keep,
    Mixture,
    MixtureState,
    Overlap,
    TaskStream,
    choose_tasks,
    keep_all,
    load_embedder,
)
from agentopd.mixture.embedding import Embed
from agentopd.models import model_hash, settle_dtype
from agentopd.objective.masks import ClassifyTokens
from agentopd.objective.streams import Batch
from agentopd.stats import cpu_seconds
from agentopd.teaching import Teachers, build_teachers
from agentopd.trackers import Tracker, open_tracker, require_trackers
from agentopd.tracking import (
    MEND_TO_RESUME,
    Provenance,
    QuarantinedEpisode,
    RunDirectory,
    Session,
    read_record,
    user_errors,
    write_atomic,
)
from agentopd.types import Task


@dataclass
class Run:
    """Everything a training loop acts with. Make one with ``start`` or ``resume``."""

    config: RunConfig
    directory: RunDirectory | None
    """None on ranks other than the first: only one of them writes."""
    skills: dict[str, Skill]
    policy: Policy
    teachers: Teachers
    judge: Judge
    learner: DeepSpeedLearner
    mixture: Mixture
    heldout: dict[str, list[Task]]
    root: Path
    classify: ClassifyTokens
    step: int = 0
    """Finished steps."""
    restored: bool = False
    """Whether it goes on from a checkpoint."""
    tracker: Tracker | None = None
    evals: dict[str, EvalResult] = field(default_factory=dict)
    kept_step: int | None = None
    """The latest checkpoint at which every old skill was within its tolerance, where a guard watches."""
    embed: Embed | None = None
    """Sentence embeddings, where replay chooses its tasks by them."""
    overlaps: Mapping[tuple[str, str], Overlap] = field(default_factory=dict)
    """Training tasks met so far that are held-out tasks in other words, by skill and task."""
    kept: Keep = keep_all
    """Leaves them out, where that is asked for."""
    _stage: int = -1
    _cpu_logged: float = 0.0

    @classmethod
    def start(cls, config: RunConfig, allow_uncertified: Sequence[str] = ()) -> Run:
        """Load and check every part of a new run; nothing is written before ``open``.

        Raises ``UserError`` for a skill whose environment has no certificate and is not in ``allow_uncertified``.
        """
        require_certificates(load_skills(config.suite), allow_uncertified)
        run = cls._build(_settled(config), Path(config.run_dir))
        RunDirectory.check_free(config.run_dir)
        if runtime.rank() == 0:
            require_trackers(config.tracking)
        runtime.barrier()  # the directory is rank 0's to fill once every rank has found it free
        return run

    @classmethod
    def resume(cls, path: str | Path) -> Run:
        """Continue a run from its newest checkpoint, exactly where it stood, or from its beginning if it has none.

        Then it keeps what was measured before the first step. Raises ``UserError``.
        """
        directory = RunDirectory.open(path)
        config = load_run_config(directory.config)
        restored = has_checkpoint(directory, config.train)
        if not restored:
            _require_same_models(directory, config)
        run = cls._build(config, directory.path)
        run.restored = restored
        if restored:
            run.step, mixture = load_latest(directory.checkpoints, run.learner)
            run.kept_step = latest_kept_step(directory.checkpoints)
            run.enter_stage()
            run.mixture.restore(mixture)
            run.policy.engine.sync_weights(run.step)
        runtime.barrier()  # every rank has seen what there is
        if runtime.rank() == 0:
            require_trackers(config.tracking)
            directory.resume(Session.now(sys.argv, from_step=run.step), restored)
            run.directory = directory
            run.tracker = open_tracker(directory, config.tracking, from_step=run.step)
        runtime.barrier()  # evaluations of later steps are gone now
        for file in sorted(directory.eval.glob("*.json")):
            run.evals[file.stem] = read_record(file, EvalResult, MEND_TO_RESUME)
        return run

    @classmethod
    def _build(cls, config: RunConfig, root: Path) -> Run:
        runtime.join(config.learner.collective_timeout_s)
        _seed_everything(config)
        skills = load_skills(config.suite)
        judge = Judge(skills.values(), build_sandbox(config.sandbox, skills.values(), config.ray))
        policy = build_policy(config.model.student, config.model.dtype, config.rollout, config.model.lora, config.ray)
        teachers = build_teachers(config, policy, skills, judge, root)
        heldout = heldout_tasks(skills.values(), config.eval.tasks_per_skill, config.eval.seed)
        model = config.decontamination.embedding_model
        embed = load_embedder(model, "decontamination.embedding_model") if model else None
        clean = Decontaminator(heldout, config.decontamination, embed)
        streams = {name: _stream(config, skill, clean.kept) for name, skill in skills.items()}
        suite, retry_share = config.suite, config.train.retry_share
        mixture = Mixture(streams, suite.skills, config.replay, suite.temperature, retry_share)
        learner = DeepSpeedLearner(policy.model, config.learner, config.objective, config.train.steps, teachers.heads())
        learner.stretches = [stage.steps for stage in config.stages] or learner.stretches
        classify = policy.classify(segments=any(x.masks.suffix != "off" for x in config.objective.every_stage()))
        run = cls(config, None, skills, policy, teachers, judge, learner, mixture, heldout, root, classify)
        run.overlaps, run.kept = clean.found, clean.kept
        if config.replay.policy == "coreset":
            run.embed = load_embedder(config.replay.coreset.model, "replay.coreset.model")
        return run

    @property
    def progress(self) -> float:
        """Share of the steps that are done."""
        return self.step / self.config.train.steps

    @property
    def blocks(self) -> Blocks:
        """The objective's blocks that are in force."""
        return self.config.objective.at(self.progress)

    @property
    def old_skills(self) -> frozenset[str]:
        """Names of the skills to keep at this step."""
        return frozenset(self.config.old_at(self.step))

    @property
    def tolerated_drop(self) -> float | None:
        """The suite's declared tolerance."""
        declared = self.config.suite.retention
        return declared.tolerated_drop if declared else None

    def enter_stage(self) -> None:
        """Give the mixture the roles of the stage that trains next; a coreset is chosen anew for each stage."""
        stage = self.config.stage_at(self.step)
        if stage == self._stage:
            return
        self._stage = stage
        new, old = self.config.new_at(self.step), self.config.old_at(self.step)
        self.mixture.assign(new, old)
        if self.embed is not None and self.config.replay.share > 0:
            wanted = [task for name in new for task in self._pool(name)]
            for name in old:
                chosen = choose_tasks(self._pool(name), wanted, self.embed, self.config.replay.coreset)
                self.mixture.replay_streams[name] = CoresetStream(chosen, name, self.config.seed)

    def _pool(self, name: str) -> list[Task]:
        """The first training tasks of a skill, each once."""
        tasks = _stream(self.config, self.skills[name], self.kept).take(self.config.replay.coreset.pool)
        return list({task.id: task for task in tasks}.values())

    @property
    def finished_stage(self) -> str | None:
        """The name of the stage whose last step was just taken, but for the last stage: that one ends in "final"."""
        done = 0
        for stage in self.config.stages[:-1]:
            done += stage.steps
            if done == self.step:
                return stage.name
        return None

    async def open(self) -> None:
        """Start what can fail on this machine (the sandbox), then create the run directory of a new run.

        Raises ``SandboxError`` or ``UserError``; nothing was written then.
        """
        await self.judge.start((name, tasks[0]) for name, tasks in self.heldout.items())
        if runtime.rank() == 0 and self.directory is None:
            config, began = self.config, (Session.now(sys.argv),)
            provenance = Provenance(seed=config.seed, models=_model_hashes(config), sessions=began)
            self.directory = RunDirectory.create(self.root, dump_toml(config), provenance)
            self.tracker = open_tracker(self.directory, config.tracking)
        self._list_overlaps()
        runtime.barrier()

    async def evaluate(self, stage: str, skills: Collection[str] | None = None) -> EvalResult:
        """Measure skills (default: all) on held-out tasks, store ``eval/<stage>.json``, inform the replay."""
        config = self.config.eval
        tasks = {name: found for name, found in self.heldout.items() if skills is None or name in skills}
        judged = await self._played(self.policy, tasks)
        kl = None
        if self.teachers.start is not None and self.directory is not None:
            kl = await start_kl(judged, self.teachers.start)
        result = summarise(judged, stage, config.k, step=self.step, seed=config.seed, kl=kl)
        self.evals[stage] = result
        self.inform_replay(result)
        if self.directory is not None:
            self.directory.save_eval(stage, result)
        return result

    def inform_replay(self, result: EvalResult) -> None:
        """Let replay go by what an evaluation found of the skills to keep."""
        old = {name: score for name, score in result.tasks.items() if name in self.old_skills}
        scores = {name: score.avg_at_k for name, score in old.items() if score.avg_at_k is not None}
        self.mixture.scores.update(scores, {name: old[name].change_error(self._base_of(name)) for name in scores})

    async def _played(self, actor: Policy, tasks: dict[str, list[Task]]) -> list[Judged]:
        """Judged episodes of held-out tasks; what ends a training episode ends these too."""
        allowed = self.config.rollout.max_malformed
        return await evaluate_model(actor, self.skills, tasks, self.judge, self.config.eval, max_malformed=allowed)

    def _base_of(self, skill: str) -> SkillScore:
        """The first evaluation of a skill as one to keep."""
        made = sorted((item for item in self.evals.values() if item.step is not None), key=lambda item: item.step or 0)
        found = (item.tasks.get(skill) for item in made if skill in self.config.old_at(item.step or 0))
        return next(score for score in found if score is not None and score.avg_at_k is not None)

    async def evaluate_teacher(self) -> EvalResult | None:
        """Measure the teachers on the new skills they teach: what there is to learn. None without local teachers."""
        judged = []
        for key, actor in self.teachers.actors.items():
            taught = [
                n
                for n, skill in self.skills.items()
                if skill.config.role == "new" and self.teachers.routes.get(n) == key
            ]
            tasks = {name: self.heldout[name] for name in taught}
            judged += await self._played(actor, tasks) if tasks else []
        if not judged:
            return None
        result = summarise(judged, "teacher", self.config.eval.k, seed=self.config.eval.seed)
        self.evals["teacher"] = result
        if self.directory is not None:
            self.directory.save_eval("teacher", result)
        return result

    def checkpoint(self) -> None:
        """Save everything an exact continuation needs."""
        save_checkpoint(
            self.root / "checkpoints",
            self.step,
            self.learner,
            self.mixture.state(),
            keep=self.config.train.keep_checkpoints,
            kept_step=self.kept_step,
        )
        self._list_overlaps()

    def _list_overlaps(self) -> None:
        if self.directory is not None and self.overlaps:
            lines = "".join(item.model_dump_json() + "\n" for item in self.overlaps.values())
            with user_errors(self.root):
                write_atomic(self.root / "overlaps.jsonl", lines)

    def roll_back(self, step: int) -> MixtureState:
        """Take back the weights and the optimiser of a checkpoint; steps, prompts and schedule go on from here.

        Returns the mixture's state of then.
        """
        scale = self.learner.rate_scale
        with self.policy.engine.updating():
            mixture = load_step(self.root / "checkpoints", step, self.learner)
            self.learner.steps_done, self.learner.rate_scale = self.step, scale
            self.policy.engine.sync_weights(self.step)
        return mixture

    def record(self, action: Action) -> None:
        """Log what replay or a guard did."""
        if self.directory is not None:
            self.directory.record(action)

    def quarantine(self, scored: Sequence[ScoredEpisode], batch: Batch) -> None:
        """Keep on disk what the step just finished could not train on, from every rank."""
        reasons = {**batch.quarantined, **self.learner.poisoned}
        mine = [
            QuarantinedEpisode(
                step=self.step,
                reason=reason,
                episode=scored[index].episode,
                verdict=scored[index].verdict,
                teacher_logprobs=tuple(evidence.teacher_logprobs.tolist()) if evidence else (),
            )
            for index, reason in sorted(reasons.items())
            for evidence in [scored[index].evidence]
        ]
        found = [item for part in runtime.gather_objects(mine) for item in part]
        if found and self.directory is not None:
            self.directory.quarantine(self.step, found)

    def export(self) -> Path:
        """Write the student as a Hugging Face directory, tokenizer included: ``<run>/model``."""
        path = self.root / "model"
        self.learner.export(path)
        if self.directory is not None:
            self.policy.tokenizer.save_pretrained(path)
        return path

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the step just finished, and the CPU seconds since the last one."""
        used = cpu_seconds()
        if self.tracker is not None:
            self.tracker.log(self.step, {**metrics, "time/cpu": used - self._cpu_logged})
        self._cpu_logged = used

    async def aclose(self) -> None:
        """Release sandboxes, engines, teachers and files; idempotent."""
        await self.judge.sandbox.aclose()
        await self.policy.engine.aclose()
        await self.teachers.aclose()
        self.learner.close()
        if self.tracker is not None:
            self.tracker.close()


def _stream(config: RunConfig, skill: Skill, kept: Keep) -> TaskStream:
    seed = config.seed if config.suite.seed is None else config.suite.seed
    return TaskStream(skill.env, skill.config, seed, keep=kept)


def _seed_everything(config: RunConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)


def _model_hashes(config: RunConfig) -> dict[str, str]:
    """What the models that a run begins with hold, by role."""
    local = {key: item.model for key, item in config.teachers.items() if isinstance(item, TeacherConfig)}
    return {role: model_hash(name) for role, name in {"student": config.model.student, **local}.items()}


def _require_same_models(directory: RunDirectory, config: RunConfig) -> None:
    """What was measured of other models says nothing of these. Raises ``UserError``."""
    known = read_record(directory.provenance, Provenance, MEND_TO_RESUME).models
    for role, digest in _model_hashes(config).items():
        if known.get(role, digest) != digest:
            raise UserError(
                f"{str(directory.path)!r} began with another {role}, and has no checkpoint yet: bring that model back, "
                f"or start again after `rm -r {directory.path}`"
            )


def _settled(config: RunConfig) -> RunConfig:
    """The config with ``auto`` dtypes decided, so that a run resumed on another machine computes as it began."""
    teachers = {
        key: teacher.model_copy(update={"dtype": settle_dtype(teacher.dtype)})
        if isinstance(teacher, TeacherConfig)
        else teacher
        for key, teacher in config.teachers.items()
    }
    model = config.model.model_copy(update={"dtype": settle_dtype(config.model.dtype)})
    return config.model_copy(update={"model": model, "teachers": teachers})
