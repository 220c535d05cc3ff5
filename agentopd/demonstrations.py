"""Rollouts of an actor other than the current student: a teacher's, or the frozen starting student's.

The actor plays in the same environments, token in, token out, and is judged by the same verifiers. What it did on a
task depends on the task alone, so it is sampled once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentopd.build import Judge, Policy, Skill
from agentopd.evaluate import stable_seed
from agentopd.rollout import EpisodeSpec, RolloutOptions, stream_episodes
from agentopd.rollout.cache import Judged, RolloutCache, RolloutKey
from agentopd.types import Episode, StopReason, Task


@dataclass
class Demonstrator:
    """One actor on the tasks of a run. ``identity`` names its weights and tokenizer in the cache."""

    policy: Policy
    identity: str
    skills: Mapping[str, Skill]
    judge: Judge
    cache: RolloutCache
    options: RolloutOptions
    seed: int
    keep_unjudged: bool = False
    """Keep also what the machinery broke or could not judge: for an actor that cannot be asked again later."""

    async def answer(self, prompts: Sequence[tuple[str, Task]], num: int = 1) -> list[list[Judged]]:
        """``num`` judged episodes of every (skill, task), in order; only what the cache lacks is sampled.

        Each task's are kept as soon as they are finished, so that an interruption costs only those under way.
        Episodes that the machinery broke or could not judge are returned but, without ``keep_unjudged``, not kept, so
        that the next run tries again. Raises ``EngineError``.
        """
        keys = [self._key(skill, task, num) for skill, task in prompts]
        found = [self.cache.get(key) for key in keys]
        missing = {key.digest: index for index, key in enumerate(keys) if found[index] is None}
        specs = {digest: self._specs(keys[index], prompts[index][1]) for digest, index in missing.items()}
        group_of = {spec.id: digest for digest, group in specs.items() for spec in group}
        judged: dict[str, Judged] = {}
        fresh: dict[str, list[Judged]] = {}

        async def finished(spec: EpisodeSpec, episode: Episode) -> None:
            judged[spec.id] = episode, await self.judge(spec.task, episode)
            digest = group_of[spec.id]
            if all(other.id in judged for other in specs[digest]):
                fresh[digest] = [judged[other.id] for other in specs[digest]]
                if self.keep_unjudged or all(_usable(item) for item in fresh[digest]):
                    self.cache.put(keys[missing[digest]], fresh[digest])

        every = [spec for group in specs.values() for spec in group]
        await stream_episodes(every, self.policy.engine, self.policy.renderer, finished, self.options)
        return [fresh[key.digest] if old is None else old for key, old in zip(keys, found, strict=True)]

    def has(self, skill: str, task: Task, num: int = 1) -> bool:
        """Whether the cache holds the answers to a prompt."""
        return self.cache.path(self._key(skill, task, num)).is_file()

    def _key(self, skill: str, task: Task, num: int) -> RolloutKey:
        verifier, env = self.judge.verifier(skill, task), self.skills[skill].env
        return RolloutKey(
            task_hash=task.hash,
            skill=skill,
            actor=self.identity,
            judge=f"{env.name}@{env.version}/{verifier.name}@{verifier.version}",
            num=num,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            codec=type(self.policy.codec).__name__,
            max_malformed=self.options.max_malformed,
            seed=self.seed,
        )

    def _specs(self, key: RolloutKey, task: Task) -> list[EpisodeSpec]:
        group = f"demonstration/{key.digest}"
        return [
            EpisodeSpec(
                task=task,
                env_cls=self.skills[key.skill].env,
                id=f"{group}#{copy}",
                group_id=group,
                skill=key.skill,
                seed=stable_seed("demonstration", key.digest, copy),
            )
            for copy in range(key.num)
        ]

    async def aclose(self) -> None:
        """Release the engine."""
        await self.policy.engine.aclose()


def _usable(item: Judged) -> bool:
    episode, verdict = item
    return episode.stop_reason is not StopReason.ENV_ERROR and verdict.outcome is not None
