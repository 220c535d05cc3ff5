"""Who teaches which skill: the teachers, references and demonstrators that a run's objective needs, and no others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentopd.build import Judge, Policy, Skill, live_options
from agentopd.config.objective import Blocks
from agentopd.config.objective_data import OfflineSource, SimCT
from agentopd.config.run import RunConfig
from agentopd.config.teachers import ChatTeacherConfig, ServedTeacherConfig, TeacherConfig
from agentopd.contracts import Teacher
from agentopd.demonstrations import Demonstrator
from agentopd.engines import HFEngine
from agentopd.errors import ConfigError
from agentopd.learner.head import Head
from agentopd.models import (
    check_same_vocabulary,
    load_model,
    load_tokenizer,
    model_hash,
    tokenizer_hash,
    vocabulary_hash,
)
from agentopd.rendering import ChatRenderer
from agentopd.rollout import RolloutOptions
from agentopd.rollout.cache import RolloutCache
from agentopd.teachers.chat import ChatEndpoint
from agentopd.teachers.local import LocalTeacher, with_outputs_swapped
from agentopd.teachers.rubric import RubricJudge
from agentopd.teachers.served import Needs, ServedTeacher
from agentopd.teachers.stored import StoredTeacher, StoreHeader
from agentopd.teachers.views import CrossTokenizerView, Misreading, Opening, PrivilegedView, View
from agentopd.types import Task, ToolSchema

RETENTION_TEACHER = "start"
"""The frozen starting student: the teacher of old skills that name no other."""
_MISTAKABLE = 64
"""Tasks of a skill that a misreading teacher chooses from."""


@dataclass
class Teachers:
    """Who scores and who demonstrates which skill. Everything is keyed by a name of ``[teachers]``, or ``start``."""

    routes: dict[str, str] = field(default_factory=dict)
    """Skill to teacher."""
    by_key: dict[str, Teacher] = field(default_factory=dict)
    """The teachers that score."""
    views: dict[str, View] = field(default_factory=dict)
    """How a teacher looks at episodes, where it does not see what the student saw."""
    actors: dict[str, Policy] = field(default_factory=dict)
    """Teachers that can act in this process."""
    demonstrators: dict[str, Demonstrator] = field(default_factory=dict)
    """The same with verdicts and a cache, where the objective trains on their rollouts."""
    stored_rollouts: Demonstrator | None = None
    """The starting student's rollouts, where they are read from disk."""
    reference_routes: dict[str, str] = field(default_factory=dict)
    """Skill to reference policy; empty where no block reads one."""
    references: dict[str, Teacher] = field(default_factory=dict)
    start: Teacher | None = None
    """The frozen starting student, where evaluations measure the KL to it; the first rank alone scores by it."""
    texts: dict[str, ChatEndpoint] = field(default_factory=dict)
    """Teachers that answer in text only."""
    judge: RubricJudge | None = None

    def heads(self) -> dict[str, Head]:
        """Output projections of the local teachers whose whole distributions are compared."""
        found = {}
        for key, teacher in self.by_key.items():
            if isinstance(teacher, LocalTeacher) and teacher.keep_hidden:
                view, head = self.views.get(key), teacher.head
                shared = view.shared if isinstance(view, CrossTokenizerView) else None
                ids = None if shared is None else torch.from_numpy(shared).to(head.weight.device)
                found[key] = head._replace(student_ids=ids)
        return found

    def elsewhere(self) -> Teachers:
        """Those that score on other machines, which may do so whatever this one is at."""
        far = {key for key, teacher in self.by_key.items() if isinstance(teacher, ServedTeacher)}
        return replace(self, routes={skill: key for skill, key in self.routes.items() if key in far})

    def _scorers(self) -> list[Teacher]:
        start = [self.start] if self.start is not None else []
        return [*self.by_key.values(), *self.references.values(), *start]

    async def aclose(self) -> None:
        """Release every teacher."""
        for teacher in {id(x): x for x in self._scorers()}.values():
            await teacher.aclose()
        for actor in self.actors.values():
            await actor.engine.aclose()
        for endpoint in [*self.texts.values(), *([self.judge.endpoint] if self.judge else [])]:
            await endpoint.aclose()


def build_teachers(
    config: RunConfig, policy: Policy, skills: Mapping[str, Skill], judge: Judge, root: Path
) -> Teachers:
    """Load the models that the run's skills are routed to, for what any stage of the objective reads of them.

    Old skills without a teacher of their own are taught by the frozen starting student. Raises ``ConfigError`` where a
    teacher's vocabulary does not fit the objective's alignment.
    """
    stages = list(config.objective.every_stage())
    teachers = Teachers(routes=routes(config, stages))
    faculty = _Faculty(config, stages, policy, skills, root)
    for key in sorted(set(teachers.routes.values())):
        faculty.add(teachers, key)
    if any(blocks.needs_teacher_rollouts for blocks in stages):
        cache = RolloutCache(config.demonstrations.cache or root / "demonstrations")
        for key, actor in teachers.actors.items():
            teachers.demonstrators[key] = _demonstrator(config, actor, faculty.identity(key), skills, judge, cache)
    for blocks in stages:
        if isinstance(blocks.source, OfflineSource):
            _read_from_disk(config, blocks, policy, teachers, faculty, _offline_root(blocks.source, root))
            cache = RolloutCache(_offline_root(blocks.source, root) / "rollouts")
            start = faculty.identity(RETENTION_TEACHER)
            stored = _demonstrator(config, policy, start, skills, judge, cache)
            teachers.stored_rollouts = replace(stored, keep_unjudged=True)
    if config.judge is not None:
        teachers.judge = RubricJudge(ChatEndpoint(config.judge, root / "judge"), config.judge)
    if any(blocks.needs_reference for blocks in stages):
        faculty.add_references(teachers)
    if config.eval.measures_kl and os.environ.get("RANK", "0") == "0":  # the ranks have not met yet
        teachers.start = LocalTeacher(RETENTION_TEACHER, faculty.start())
    return teachers


def served_needs(config: RunConfig, key: str, tokenizer: Any) -> Needs:
    """What the stages of the objective read of the served teacher ``key``: nothing of one that teaches no skill."""
    stages = list(config.objective.every_stage())
    taught = key in routes(config, stages).values()
    top_k, student_top_k = (
        max(sizes) if taught else 0 for sizes in zip(*((x.top_k, x.student_top_k) for x in stages), strict=True)
    )
    return Needs(vocabulary_hash(tokenizer), len(tokenizer), top_k, student_top_k)


def routes(config: RunConfig, stages: Sequence[Blocks]) -> dict[str, str]:
    """The key of the teacher of every skill that is trained or replayed; none where no stage asks a teacher."""
    if all(blocks.teacher_access == "none" for blocks in stages):
        return {}
    trained = [skill for skill in config.suite.skills if skill.role == "new" or config.replay.share > 0]
    fallback = {"new": "default", "old": RETENTION_TEACHER}
    return {skill.name: config.teacher_of(skill) or fallback[skill.role] for skill in trained}


def _demonstrator(
    config: RunConfig, actor: Policy, identity: str, skills: Mapping[str, Skill], judge: Judge, cache: RolloutCache
) -> Demonstrator:
    rollout = config.rollout
    live = live_options(skills.values())
    options = RolloutOptions(rollout.temperature, rollout.top_p, rollout.max_malformed, judge.sandbox, **live)
    return Demonstrator(actor, identity, skills, judge, cache, options, config.seed)


def _offline_root(source: OfflineSource, root: Path) -> Path:
    return Path(source.path) if source.path is not None else root / "offline"


def _read_from_disk(
    config: RunConfig, blocks: Blocks, policy: Policy, teachers: Teachers, faculty: _Faculty, root: Path
) -> None:
    """Put a store in front of every teacher."""
    assert isinstance(blocks.source, OfflineSource)
    for key, live in teachers.by_key.items():
        header = StoreHeader(
            teacher=faculty.identity(key),
            tokenizer=tokenizer_hash(policy.tokenizer),
            top_k=blocks.top_k,
            student=faculty.identity(RETENTION_TEACHER),
        )
        teachers.by_key[key] = StoredTeacher(key, root / "evidence" / key, header, live, blocks.source.allow_mismatch)


class _Faculty:
    """Loads each model once."""

    def __init__(
        self, config: RunConfig, stages: Sequence[Blocks], policy: Policy, skills: Mapping[str, Skill], root: Path
    ) -> None:
        self.config, self.policy, self.skills, self.root = config, policy, skills, root
        self.scores = any(blocks.needs_teacher or blocks.top_k for blocks in stages)
        self.alignment = next((blocks.alignment for blocks in stages if blocks.alignment.kind != "same"), None)
        self.whole = any(blocks.needs_full_vocabulary for blocks in stages)
        self.base = any(blocks.needs_reference and blocks.reference.policy == "teacher_base" for blocks in stages)
        self._start: Any = None
        self._known: dict[str, list[Task]] = {}
        self._served: dict[str, ServedTeacher] = {}

    def identity(self, key: str) -> str:
        """A teacher's weights, and what else decides its answers to the same tokens; for caches and stores."""
        chosen = self.config.teachers.get(key)
        if isinstance(chosen, ServedTeacherConfig):
            return self._served[key].model
        if not isinstance(chosen, TeacherConfig):
            return model_hash(self.config.model.student)
        ends = f", ends turns with {chosen.end_of_turn}" if chosen.end_of_turn else ""
        return f"{model_hash(chosen.model)}{ends}"

    def start(self) -> Any:
        """The frozen starting student."""
        if self._start is None:
            self._start = load_model(self.config.model.student, self.config.model.dtype)
        return self._start

    def add(self, teachers: Teachers, key: str) -> None:
        """A teacher by the name that skills are routed to."""
        if key not in self.config.teachers:
            teachers.actors[key] = self.policy.acting_as(self.start())
            if self.scores:
                teachers.by_key[key] = LocalTeacher(key, self.start(), keep_hidden=self.whole)
            return
        chosen = self.config.teachers[key]
        if isinstance(chosen, ChatTeacherConfig):
            teachers.texts[key] = ChatEndpoint(chosen, self.root / "answers")
            return
        if isinstance(chosen, ServedTeacherConfig):
            needs = served_needs(self.config, key, self.policy.tokenizer)
            teachers.by_key[key] = self._served[key] = ServedTeacher(key, chosen, needs)
            return
        model, tokenizer = load_model(chosen.model, chosen.dtype), load_tokenizer(chosen.model)
        scorer = self._with_its_end_of_turn(key, model, chosen)
        if self.alignment is not None:
            renderer = ChatRenderer(tokenizer, self.policy.codec)
            vocab_size = len(tokenizer)
            actor = replace(self.policy, model=model, tokenizer=tokenizer, renderer=renderer, engine=HFEngine(model))
            project = isinstance(self.alignment, SimCT) and self.alignment.project
            teachers.views[key] = CrossTokenizerView(self._opening(chosen), renderer, project)
        else:
            check_same_vocabulary(self.policy.tokenizer, tokenizer, key)
            vocab_size, actor = len(self.policy.tokenizer), self.policy.acting_as(model)
            if chosen.context != "student" or chosen.misread_share:
                teachers.views[key] = PrivilegedView(self._opening(chosen))
        teachers.actors[key] = actor
        if self.scores:
            teachers.by_key[key] = LocalTeacher(key, scorer, chosen.batch_tokens, vocab_size, self.whole)

    def add_references(self, teachers: Teachers) -> None:
        """The reference policy of every trained skill: the frozen start, or the base of the skill's teacher."""
        for skill in self.config.suite.skills:
            key = teachers.routes.get(skill.name, RETENTION_TEACHER)
            chosen = self.config.teachers.get(key)
            if self.base and isinstance(chosen, TeacherConfig) and chosen.base is not None:
                name = f"{key}/base"
                if name not in teachers.references:
                    check_same_vocabulary(self.policy.tokenizer, load_tokenizer(chosen.base), name)
                    base, size = load_model(chosen.base, chosen.dtype), len(self.policy.tokenizer)
                    teachers.references[name] = LocalTeacher(name, base, chosen.batch_tokens, size)
            else:
                name = RETENTION_TEACHER
                if name not in teachers.references:
                    teachers.references[name] = LocalTeacher("reference", self.start())
            teachers.reference_routes[skill.name] = name

    def _with_its_end_of_turn(self, key: str, model: Any, chosen: TeacherConfig) -> Any:
        if chosen.end_of_turn is None:
            return model
        tokenizer, own = self.policy.tokenizer, self.policy.renderer.end_of_turn_id
        end = tokenizer.get_vocab().get(chosen.end_of_turn)
        if self.alignment is not None or end in (None, own):
            why = "needs the student's tokenizer" if self.alignment is not None else "must be another token of it"
            what = f"teachers.{key}.end_of_turn {chosen.end_of_turn!r}"
            raise ConfigError(f"{what} {why}; the student ends its turns with {tokenizer.convert_ids_to_tokens(own)!r}")
        return with_outputs_swapped(model, end, own)

    def _opening(self, chosen: TeacherConfig) -> Opening:
        privilege = None if chosen.context == "student" else chosen.context
        misread = Misreading(chosen.misread_share, self._others) if chosen.misread_share else None
        return Opening(self.policy.renderer, partial(_tools, self.skills), privilege, misread)

    def _others(self, skill: str) -> list[Task]:
        """Tasks that a teacher may take another one of the skill for."""
        if skill not in self._known:
            self._known[skill] = self.skills[skill].tasks("train", _MISTAKABLE, self.config.seed)
        return self._known[skill]


def _tools(skills: Mapping[str, Skill], skill: str, task: Task) -> tuple[ToolSchema, ...]:
    return skills[skill].env.tool_schemas(task)
