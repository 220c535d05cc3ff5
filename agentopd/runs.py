"""A run: its live parts, where it stands, and what it leaves on disk."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from agentopd.build import Judge, Policy, Skill, Teachers, build_policy, build_sandbox, build_teachers, load_skills
from agentopd.checkpoint import load_latest, save_checkpoint
from agentopd.config import RunConfig, dump_toml, load_run_config
from agentopd.evaluate import evaluate_model, heldout_tasks, summarise
from agentopd.evaluation.metrics import EvalResult
from agentopd.learner import runtime
from agentopd.learner.deepspeed import DeepSpeedLearner
from agentopd.mixture import Mixture, TaskStream
from agentopd.models import model_hash, settle_dtype
from agentopd.objective.masks import ClassifyTokens
from agentopd.tracking import Provenance, RunDirectory, Session, Tracker, open_tracker
from agentopd.types import Task


class Clock:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """``time/<phase>`` in seconds."""
        return {f"time/{name}": value for name, value in self.seconds.items()}


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
    tracker: Tracker | None = None
    evals: dict[str, EvalResult] = field(default_factory=dict)

    @classmethod
    def start(cls, config: RunConfig) -> Run:
        """Load and check every part of a new run; nothing is written before ``open``."""
        run = cls._build(_settled(config), Path(config.run_dir))
        RunDirectory.check_free(config.run_dir)
        return run

    @classmethod
    def resume(cls, path: str | Path) -> Run:
        """Continue a run from its newest checkpoint, exactly where it stood. Raises ``UserError``."""
        directory = RunDirectory.open(path)
        config = load_run_config(directory.config)
        run = cls._build(config, directory.path)
        run.step, mixture = load_latest(directory.checkpoints, run.learner)
        run.mixture.restore(mixture)
        run.policy.engine.sync_weights(run.step)
        if runtime.rank() == 0:
            directory.resume(Session.now(sys.argv, from_step=run.step))
            run.directory = directory
            run.tracker = open_tracker(directory, config.tracking.tensorboard, from_step=run.step)
        for name in ("base", "teacher"):
            file = directory.eval / f"{name}.json"
            if file.is_file():
                run.evals[name] = EvalResult.model_validate_json(file.read_text())
        runtime.barrier()
        return run

    @classmethod
    def _build(cls, config: RunConfig, root: Path) -> Run:
        _seed_everything(config)
        skills = load_skills(config.suite)
        policy = build_policy(config.model.student, config.model.dtype, config.rollout)
        teachers = build_teachers(config, policy)
        judge = Judge(skills.values(), build_sandbox(config.sandbox))
        heldout = heldout_tasks(skills.values(), config.eval.tasks_per_skill, config.eval.seed)
        streams = {name: TaskStream(skill.env, skill.config, config.seed) for name, skill in skills.items()}
        mixture = Mixture(streams, config.suite.skills, config.replay)
        learner = DeepSpeedLearner(policy.model, config.learner, config.objective, config.train.steps)
        return cls(config, None, skills, policy, teachers, judge, learner, mixture, heldout, root, policy.classify())

    @property
    def old_skills(self) -> frozenset[str]:
        """Names of the skills to keep."""
        return frozenset(name for name, skill in self.skills.items() if skill.config.role == "old")

    async def open(self) -> None:
        """Start what can fail on this machine (the sandbox), then create the run directory of a new run.

        Raises ``SandboxError`` or ``UserError``; nothing was written then.
        """
        await self.judge.start((name, tasks[0]) for name, tasks in self.heldout.items())
        if runtime.rank() == 0 and self.directory is None:
            config = self.config
            names = {"student": config.model.student, **{key: item.model for key, item in config.teachers.items()}}
            provenance = Provenance(
                seed=config.seed,
                models={role: model_hash(name) for role, name in names.items()},
                sessions=(Session.now(sys.argv),),
            )
            self.directory = RunDirectory.create(self.root, dump_toml(config), provenance)
            self.tracker = open_tracker(self.directory, tensorboard=config.tracking.tensorboard)
        runtime.barrier()

    async def evaluate(self, stage: str) -> EvalResult:
        """Measure every skill on held-out tasks, store the result as ``eval/<stage>.json``, inform the replay."""
        judged = await evaluate_model(self.policy, self.skills, self.heldout, self.judge, self.config.eval)
        result = summarise(judged, stage, self.config.eval.k, step=self.step, seed=self.config.eval.seed)
        scores = {name: score.avg_at_k for name, score in result.tasks.items() if score.avg_at_k is not None}
        self.mixture.scores.update({name: value for name, value in scores.items() if name in self.old_skills})
        self.evals[stage] = result
        if self.directory is not None:
            self.directory.save_eval(stage, result)
        return result

    async def evaluate_teacher(self) -> EvalResult | None:
        """Measure the teachers on the new skills they teach: what there is to learn. None without local teachers."""
        judged = []
        for key, model in self.teachers.models.items():
            taught = [
                n
                for n, skill in self.skills.items()
                if skill.config.role == "new" and self.teachers.routes.get(n) == key
            ]
            actor = self.policy.acting_as(model)
            tasks = {name: self.heldout[name] for name in taught}
            judged += await evaluate_model(actor, self.skills, tasks, self.judge, self.config.eval)
            await actor.engine.aclose()
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
        )

    def export(self) -> Path:
        """Write the student as a Hugging Face directory, tokenizer included: ``<run>/model``."""
        path = self.root / "model"
        self.learner.export(path)
        if self.directory is not None:
            self.policy.tokenizer.save_pretrained(path)
        return path

    def log(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the step just finished."""
        if self.tracker is not None:
            self.tracker.log(self.step, metrics)

    async def aclose(self) -> None:
        """Release sandboxes, engines, teachers and files; idempotent."""
        await self.judge.sandbox.aclose()
        await self.policy.engine.aclose()
        await self.teachers.aclose()
        self.learner.close()
        if self.tracker is not None:
            self.tracker.close()


def _seed_everything(config: RunConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)


def _settled(config: RunConfig) -> RunConfig:
    """The config with ``auto`` dtypes decided, so that a run resumed on another machine computes as it began."""
    teachers = {
        key: teacher.model_copy(update={"dtype": settle_dtype(teacher.dtype)})
        for key, teacher in config.teachers.items()
    }
    model = config.model.model_copy(update={"dtype": settle_dtype(config.model.dtype)})
    return config.model_copy(update={"model": model, "teachers": teachers})
