"""The composition root: config in, live parts out. The only module that turns names into concrete things."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import islice
from typing import Any

from agentopd.config.run import RolloutConfig, RunConfig, SandboxConfig, SkillConfig, SuiteConfig
from agentopd.contracts import Environment, Sandbox, SandboxLimits, Teacher, Verifier
from agentopd.engines import HFEngine
from agentopd.errors import ConfigError
from agentopd.models import check_same_vocabulary, load_model, load_tokenizer
from agentopd.objective.masks import ClassifyTokens, TokenClasses
from agentopd.registry import datasets, environments, sandboxes, tool_codecs, verifiers
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.scoring import judge
from agentopd.teachers.local import LocalTeacher
from agentopd.types import Episode, Split, Task, Verdict

RETENTION_TEACHER = "start"
"""The frozen starting student: the teacher of old skills that name no other."""
_ENDLESS = 1024
"""A source with at least this many tasks is taken to be procedural when no limit is given."""
_DEFAULT_LIMIT = 200
"""Tasks drawn from a procedural source when no limit is given."""


@dataclass(frozen=True)
class Skill:
    """A suite entry with its environment class."""

    config: SkillConfig
    env: type[Environment]

    @property
    def name(self) -> str:
        """The name that keys its metrics."""
        return self.config.name

    def tasks(self, split: Split, limit: int | None, seed: int) -> list[Task]:
        """Up to ``limit`` tasks of a split; without a limit every row, or 200 of a procedural source."""
        source = self.env.load_tasks(split, self.config.source, limit, seed)
        tasks = list(islice(source, limit if limit is not None else _ENDLESS))
        if limit is None and len(tasks) == _ENDLESS:
            tasks = tasks[:_DEFAULT_LIMIT]
        if not tasks:
            raise ConfigError(f"skill {self.name!r}: source {self.config.source!r} has no {split} tasks")
        limits = self.config.limits
        return [task.model_copy(update={"limits": limits}) for task in tasks] if limits else tasks


def load_skills(suite: SuiteConfig) -> dict[str, Skill]:
    """The suite's skills by name. Raises ``RegistryError`` or ``ConfigError`` for an unknown environment or source."""
    skills = {}
    for config in suite.skills:
        env = environments.get(config.env)
        known = (*getattr(env, "sources", (config.source,)), *datasets.entries())
        if config.source not in known and ":" not in config.source:
            raise ConfigError(
                f"skill {config.name!r}: environment {config.env!r} has no source {config.source!r}; "
                f"it has: {', '.join(known)}; registered data sets and file.py:loader paths work too"
            )
        skills[config.name] = Skill(config, env)
    return skills


class Judge:
    """Judges episodes with the verifier of their task; verifiers are made once each, on first use."""

    def __init__(self, skills: Iterable[Skill], sandbox: Sandbox) -> None:
        self._skills = {skill.name: skill for skill in skills}
        self._verifiers: dict[str, Verifier] = {}
        self.sandbox = sandbox

    def verifier(self, skill: str, task: Task) -> Verifier:
        """The verifier of one task of a skill."""
        config, env = self._skills[skill].config, self._skills[skill].env
        name = config.verifier or env.verifier_for(task)  # type: ignore[attr-defined]
        if name not in self._verifiers:
            self._verifiers[name] = verifiers.get(name)()
        return self._verifiers[name]

    async def __call__(self, task: Task, episode: Episode) -> Verdict:
        """The verdict on one finished episode; machinery faults come back without an outcome."""
        verifier = self.verifier(episode.skill, task)
        return await judge(task, episode, verifier, self.sandbox if verifier.needs_sandbox else None)

    async def start(self, samples: Iterable[tuple[str, Task]]) -> None:
        """Start the sandbox if any sample's verifier needs it, so that a missing one stops the run at once."""
        if any(self.verifier(skill, task).needs_sandbox for skill, task in samples):
            await self.sandbox.start()


def build_sandbox(config: SandboxConfig) -> Sandbox:
    """The configured sandbox backend, not started."""
    workers = config.workers or os.cpu_count() or 1
    limits = SandboxLimits(wall_s=config.wall_s, cpu_s=config.wall_s, memory_mb=config.memory_mb)
    backend = sandboxes.get(config.backend)
    options = {key: value for key in ("hosts", "runtime") if (value := getattr(config, key))}
    for key in options.keys() - signature(backend).parameters.keys():
        raise ConfigError(f"sandbox.{key} has no effect on the backend {config.backend!r}; leave it out")
    sandbox: Sandbox = backend(workers=workers, limits=limits, **options)
    return sandbox


@dataclass
class Policy:
    """The student as an actor: its model, how it speaks, and the engine that samples from it."""

    model: Any
    tokenizer: Any
    codec: ToolCodec
    renderer: ChatRenderer
    engine: HFEngine

    def classify(self) -> ClassifyTokens:
        """Token classes for the objective: role and end-of-turn markers, and tool-call spans."""
        control = frozenset(self.tokenizer.all_special_ids) | frozenset(self.renderer.end_of_turn_ids)

        def classes(ids: Sequence[int]) -> TokenClasses:
            return TokenClasses(
                special=tuple(token in control for token in ids), in_span=tuple(self.renderer.call_mask(ids).tolist())
            )

        return classes

    @property
    def pad_id(self) -> int:
        """An id to pad with; padding is never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.renderer.end_of_turn_ids[0])

    def acting_as(self, model: Any) -> Policy:
        """The same voice with another model: a teacher that is to be measured on the student's tasks."""
        engine = HFEngine(model, batch_size=self.engine.batch_size)
        return replace(self, model=model, engine=engine)


def build_policy(model_name: str, dtype: str, config: RolloutConfig) -> Policy:
    """Load a student and everything it acts with. Raises ``ConfigError``."""
    tokenizer = load_tokenizer(model_name)
    codec: ToolCodec = tool_codecs.get(config.codec)()
    renderer = ChatRenderer(tokenizer, codec)
    model = load_model(model_name, dtype)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ConfigError(
            f"model {model_name!r} has {model.get_input_embeddings().num_embeddings} embeddings but its tokenizer "
            f"{len(tokenizer)} tokens; resize the embeddings or fix the tokenizer"
        )
    engine = HFEngine(model, batch_size=config.batch_size, turn_cache_mb=config.turn_cache_mb)
    return Policy(model, tokenizer, codec, renderer, engine)


@dataclass
class Teachers:
    """Who scores which skill, and the reference policy if the objective has one."""

    by_key: dict[str, Teacher] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    reference: Teacher | None = None
    models: dict[str, Any] = field(default_factory=dict)
    """The models behind teachers that can also act in this process, by key."""

    async def aclose(self) -> None:
        """Release every teacher."""
        for teacher in [*self.by_key.values(), *([self.reference] if self.reference else [])]:
            await teacher.aclose()


def build_teachers(config: RunConfig, policy: Policy) -> Teachers:
    """Load the teachers that the run's skills are routed to; the vocabulary of each is compared with the student's.

    Old skills without a teacher of their own are taught by the frozen starting student.
    """
    teachers = Teachers()
    objective = config.objective
    if objective.needs_teacher:
        for skill in config.suite.skills:
            if skill.role == "old" and config.replay.share == 0:
                continue
            fallback = "default" if skill.role == "new" else RETENTION_TEACHER
            teachers.routes[skill.name] = skill.teacher or fallback
    start = (config.model.student, config.model.dtype)
    for key in sorted(set(teachers.routes.values())):
        if key == RETENTION_TEACHER and key not in config.teachers:
            teachers.by_key[key] = LocalTeacher(key, load_model(*start))
            continue
        chosen = config.teachers[key]
        check_same_vocabulary(policy.tokenizer, load_tokenizer(chosen.model), key)
        teachers.models[key] = load_model(chosen.model, chosen.dtype)
        teachers.by_key[key] = LocalTeacher(key, teachers.models[key], chosen.batch_tokens, len(policy.tokenizer))
    if objective.needs_reference:
        shared = teachers.by_key.get(RETENTION_TEACHER)
        teachers.reference = shared or LocalTeacher("reference", load_model(*start))
    return teachers
