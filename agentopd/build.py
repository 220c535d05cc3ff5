"""The composition root: config in, live parts out. The only module that turns names into concrete things.

Models and their libraries are imported where one is loaded: who looks at environments or verdicts does not wait for
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from agentopd.config.model import LoRAConfig
from agentopd.config.run import RolloutConfig, SandboxConfig, SkillConfig, SuiteConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Engine, Environment, GroupVerifier, Sandbox, Verifier
from agentopd.errors import ConfigError
from agentopd.registry import datasets, environments, tool_codecs, verifiers
from agentopd.rendering import ChatRenderer
from agentopd.rendering.codecs import ToolCodec
from agentopd.scaleout.verification import RaySandbox, RayVerifier, local_sandbox
from agentopd.scoring import judge
from agentopd.types import Episode, Split, Task, Verdict

if TYPE_CHECKING:
    from agentopd.objective.masks import ClassifyTokens

SENTENCE_ENDS = ("\n", ".", "!", "?", ";")
"""What ends a segment of a turn, for blocks that read a turn in segments."""
_ENDLESS = 1024
"""A source with at least this many tasks that names no rows is taken to be procedural when no limit is given."""
_DEFAULT_LIMIT = 200
"""Tasks drawn from a procedural source when no limit is given."""
_MOST = 100_000
"""Rows beyond which a source may have no end after all."""


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
        source = iter(self.env.load_tasks(split, self.config.source, limit, seed))
        tasks = list(islice(source, limit if limit is not None else _ENDLESS))
        if limit is None and len(tasks) == _ENDLESS:
            tasks = [*tasks, *islice(source, _MOST)] if tasks[0].source.row else tasks[:_DEFAULT_LIMIT]
        if len(tasks) > _MOST and limit is None:
            raise ConfigError(f"skill {self.name!r}: more than {_MOST} {split} tasks: say how many with --limit")
        if not tasks:
            raise ConfigError(f"skill {self.name!r}: source {self.config.source!r} has no {split} tasks")
        limits = self.config.limits
        return [task.model_copy(update={"limits": limits}) for task in tasks] if limits else tasks

    def train_tasks(self, seed: int) -> list[Task]:
        """The ``num_train_tasks`` tasks this skill trains on, in their source's order."""
        config = self.config
        tasks = list(self.env.load_tasks("train", config.source, config.num_train_tasks, seed))
        return [task.model_copy(update={"limits": config.limits}) for task in tasks] if config.limits else tasks


def load_skills(suite: SuiteConfig) -> dict[str, Skill]:
    """The suite's skills by name. Raises ``RegistryError`` or ``ConfigError`` for an unknown environment or source."""
    skills = {}
    for config in suite.skills:
        env = environments.get(config.env)
        known = (*getattr(env, "sources", (config.source,)), *datasets.entries())
        accepts = getattr(env, "has_source", known.__contains__)
        if not accepts(config.source) and config.source not in known:
            raise ConfigError(
                f"skill {config.name!r}: environment {config.env!r} has no source {config.source!r}; "
                f"it has: {', '.join(known)}; registered data sets, file.py:loader paths and data.toml files work too"
            )
        skills[config.name] = Skill(config, env)
    return skills


def live_options(skills: Iterable[Skill]) -> dict[str, Any]:
    """The options of a rollout that come from the suite: bounds on live episodes, and who decodes apart."""
    configs = [skill.config for skill in skills]
    return {
        "max_live": {config.name: config.max_live for config in configs if config.max_live is not None},
        "own_batches": frozenset(config.name for config in configs if config.own_batches),
    }


class Judge:
    """Judges episodes with the verifier of their task; verifiers are made once each, on first use.

    With a ``RaySandbox`` they judge where its programs run.
    """

    def __init__(self, skills: Iterable[Skill], sandbox: Sandbox) -> None:
        self._skills = {skill.name: skill for skill in skills}
        self._verifiers: dict[str, Verifier] = {}
        self._elsewhere: dict[tuple[str, str], Verifier] = {}
        self.sandbox = sandbox

    def verifier(self, skill: str, task: Task) -> Verifier:
        """The verifier of one task of a skill."""
        name = self._name(skill, task)
        if name not in self._verifiers:
            self._verifiers[name] = verifiers.get(name)()
        return self._verifiers[name]

    async def __call__(self, task: Task, episode: Episode) -> Verdict:
        """The verdict on one finished episode; machinery faults come back without an outcome."""
        verifier = self._judging(episode.skill, task)
        return await judge(task, episode, verifier, self.sandbox if verifier.needs_sandbox else None)

    def _judging(self, skill: str, task: Task) -> Verifier:
        """The verifier, or who stands for it where its work is done elsewhere."""
        verifier = self.verifier(skill, task)
        if not isinstance(self.sandbox, RaySandbox):
            return verifier
        env, name = self._skills[skill].config.env, self._name(skill, task)
        if (env, name) not in self._elsewhere:
            self._elsewhere[env, name] = RayVerifier.instead_of(verifier, self.sandbox.pool, env, name)
        return self._elsewhere[env, name]

    def _name(self, skill: str, task: Task) -> str:
        config, env = self._skills[skill].config, self._skills[skill].env
        name: str = config.verifier or env.verifier_for(task)  # type: ignore[attr-defined]
        return name

    def compare(self, judged: Sequence[tuple[Episode, Verdict]], tasks: Mapping[str, Task]) -> list[Verdict]:
        """The verdicts, in order, each group's set against one another where its verifier does that.

        ``tasks`` leads from a task's hash to the task.
        """
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for index, (episode, _) in enumerate(judged):
            groups[episode.group_id or episode.id, episode.task_hash].append(index)
        verdicts = [verdict for _, verdict in judged]
        for (_, task_hash), members in groups.items():
            task, skill = tasks[task_hash], judged[members[0]][0].skill
            verifier = self.verifier(skill, task)
            if isinstance(verifier, GroupVerifier):
                compared = verifier.compare(task, [verdicts[index] for index in members])
                for index, verdict in zip(members, compared, strict=True):
                    verdicts[index] = verdict
        return verdicts

    async def start(self, samples: Iterable[tuple[str, Task]]) -> None:
        """Start the sandbox if any sample's verifier needs it, so that a missing one stops the run at once."""
        if any(self.verifier(skill, task).needs_sandbox for skill, task in samples):
            await self.sandbox.start()


def build_sandbox(config: SandboxConfig, skills: Iterable[Skill] = (), ray: RayConfig | None = None) -> Sandbox:
    """The configured sandbox backend with the libraries that the environments of ``skills`` ask for, not started.

    With ``ray.verification_workers`` it stands for the sandboxes of workers on other machines.
    """
    libraries = {name: skill.name for skill in skills for name in getattr(skill.env, "libraries", ())}
    if ray is not None and ray.verification_workers:
        return RaySandbox.of(ray, config, libraries)
    return local_sandbox(config, libraries)


@dataclass
class Policy:
    """The student as an actor: its model, how it speaks, and the engine that samples from it."""

    model: Any
    tokenizer: Any
    codec: ToolCodec
    renderer: ChatRenderer
    engine: Engine
    batch_size: int = 256
    """Sequences that an engine in this process decodes at once."""

    def classify(self, segments: bool = False) -> ClassifyTokens:
        """Token classes for the objective: role and end-of-turn markers, tool-call spans, and ends of sentences.

        The last only with ``segments``: it decodes every token.
        """
        from agentopd.objective.masks import TokenClasses

        decode = self.tokenizer.decode
        control = frozenset(self.tokenizer.all_special_ids) | frozenset(self.renderer.end_of_turn_ids)

        def classes(ids: Sequence[int]) -> TokenClasses:
            return TokenClasses(
                special=tuple(token in control for token in ids),
                in_span=tuple(self.renderer.call_mask(ids).tolist()),
                ends_segment=tuple(decode([token]).rstrip(" ").endswith(SENTENCE_ENDS) for token in ids if segments),
            )

        return classes

    @property
    def pad_id(self) -> int:
        """An id to pad with; padding is never attended to."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.renderer.end_of_turn_ids[0])

    def acting_as(self, model: Any) -> Policy:
        """The same voice with another model: a teacher that is to be measured on the student's tasks."""
        from agentopd.engines import HFEngine

        engine = HFEngine(model, batch_size=self.batch_size)
        return replace(self, model=model, engine=engine)


def build_policy(
    model_name: str, dtype: str, config: RolloutConfig, lora: LoRAConfig | None = None, ray: RayConfig | None = None
) -> Policy:
    """Load a student and everything it acts with, on the device of this rank. Raises ``ConfigError``."""
    from agentopd.models import load_model, load_tokenizer, take_device
    from agentopd.weights import add_lora

    take_device()
    tokenizer = load_tokenizer(model_name)
    codec: ToolCodec = tool_codecs.get(config.codec)()
    renderer = ChatRenderer(tokenizer, codec)
    model = load_model(model_name, dtype)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ConfigError(
            f"model {model_name!r} has {model.get_input_embeddings().num_embeddings} embeddings but its tokenizer "
            f"{len(tokenizer)} tokens; resize the embeddings or fix the tokenizer"
        )
    if lora is not None:
        add_lora(model, lora)
    return Policy(model, tokenizer, codec, renderer, build_engine(model, config, ray), config.batch_size)


def build_engine(model: Any, config: RolloutConfig, ray: RayConfig | None = None) -> Engine:
    """The configured engine, sampling from ``model``. Raises ``ConfigError`` where it is not installed."""
    from agentopd.engines import HFEngine, VLLMEngine, VLLMServersEngine
    from agentopd.scaleout.rollout import RayEngine

    if ray is not None and ray.rollout_workers:
        return RayEngine(model, config, ray)
    if config.engine == "vllm":
        return VLLMEngine(model, config.vllm, config.cut_turns)
    if config.engine == "vllm_servers":
        return VLLMServersEngine(model, config.vllm, config.servers, cut_turns=config.cut_turns)
    return HFEngine(model, config.batch_size, turn_cache_mb=config.turn_cache_mb, cut_turns=config.cut_turns)
