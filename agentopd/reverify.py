"""Judging stored episodes again: verdicts must not depend on anything but the episode, the task and the verifier."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from agentopd.build import Judge, Skill, build_sandbox
from agentopd.config import load_run_config
from agentopd.config.run import SandboxConfig, SkillConfig
from agentopd.errors import UserError
from agentopd.registry import environments
from agentopd.tracking import KeptEpisode, read_jsonl


@dataclass(frozen=True)
class Rejudged:
    """A stored verdict beside a fresh one, each as ``status outcome reward``."""

    episode_id: str
    stored: str
    now: str

    @property
    def differs(self) -> bool:
        """Whether the two disagree."""
        return self.stored != self.now


async def rejudge(path: Path) -> list[Rejudged]:
    """Judge every kept episode of a JSONL file, or of all files in a folder. Raises ``UserError`` on bad lines."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    kept = [_parse(file, row) for file in files for row in read_jsonl(file)]
    if not kept:
        raise UserError(f"{str(path)!r} holds no kept episode: give a JSONL file, or a run's episodes folder")
    skills = {origin: _skill(*origin) for origin in {_origin(item) for item in kept}}
    sandbox = build_sandbox(_sandbox_config(path), skills.values())
    judges = {origin: Judge([skill], sandbox) for origin, skill in skills.items()}
    gate = asyncio.Semaphore(64)

    async def one(item: KeptEpisode) -> Rejudged:
        assert item.task is not None  # _parse refuses lines without one
        async with gate:
            judge = judges[_origin(item)]
            now = await judge(item.task, item.episode)
        # What was kept stands for its group, whose other episodes need not have been kept.
        stored, tasks = item.verdict, {item.task.hash: item.task}
        now, _ = judge.compare([(item.episode, now), (item.episode, stored)], tasks)
        return Rejudged(
            item.episode.id,
            f"{stored.status} {stored.outcome} {stored.reward}",
            f"{now.status} {now.outcome} {now.reward}",
        )

    try:
        return list(await asyncio.gather(*(one(item) for item in kept)))
    finally:
        await sandbox.aclose()


def _origin(item: KeptEpisode) -> tuple[str, str, str]:
    """Skill, environment and verifier, the last '' where it is the environment's own."""
    return item.episode.skill, item.environment or item.episode.env, item.verifier


def _skill(name: str, env: str, verifier: str) -> Skill:
    return Skill(SkillConfig(name=name, env=env, verifier=verifier or None), environments.get(env))


def _sandbox_config(path: Path) -> SandboxConfig:
    """The sandbox of the run that the episodes lie in; the default one for a file on its own."""
    configs = (folder / "config.toml" for folder in (path, *path.resolve().parents[:2]))
    found = next((file for file in configs if file.is_file()), None)
    return load_run_config(found).sandbox if found else SandboxConfig()


def _parse(file: Path, row: dict[str, object]) -> KeptEpisode:
    try:
        item = KeptEpisode.model_validate(row)
    except ValidationError as exc:
        raise UserError(f"{file}: not a kept episode: {exc.errors()[0]['msg']}") from None
    if item.task is None:
        raise UserError(f"{file}: episode {item.episode.id!r} was stored without its task and cannot be judged again")
    return item
