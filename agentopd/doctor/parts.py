"""What a run is put together from: certified skills, a sandbox, packages, a place to write to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from agentopd.build import Judge, build_sandbox, load_skills
from agentopd.certify.certificate import how_to_validate, is_certified
from agentopd.config import RunConfig
from agentopd.doctor.diagnosis import Diagnosis
from agentopd.engines.vllm_process import require_vllm
from agentopd.evaluate import heldout_tasks
from agentopd.mixture import load_embedder
from agentopd.trackers import require_trackers
from agentopd.tracking import RunDirectory


def certificates(config: RunConfig) -> Iterable[Diagnosis]:
    """Every skill's environment is certified."""
    for name, skill in load_skills(config.suite).items():
        certified = is_certified(skill)
        todo = f"not certified; run: agentopd envs validate {how_to_validate(skill)}"
        yield Diagnosis("certificate", "ok" if certified else "fail", f"{name}: {'certified' if certified else todo}")


def sandbox(config: RunConfig) -> Iterable[Diagnosis]:
    """The sandbox starts, where a verifier needs one."""
    skills = load_skills(config.suite)
    built = build_sandbox(config.sandbox, skills.values(), config.ray)
    judge, tasks = Judge(skills.values(), built), heldout_tasks(skills.values(), 1, config.eval.seed)
    samples = [(name, found[0]) for name, found in tasks.items()]

    async def start() -> None:
        try:
            await judge.start(samples)
        finally:
            await built.aclose()

    asyncio.run(start())
    needed = any(judge.verifier(skill, task).needs_sandbox for skill, task in samples)
    yield Diagnosis("sandbox", "ok", f"{config.sandbox.backend} {'starts' if needed else 'is not needed'}")


def packages(config: RunConfig) -> Iterable[Diagnosis]:
    """What the config asks for beyond the standard installation is there."""
    rollout, workers = config.rollout, config.ray.rollout_workers if config.ray is not None else 0
    if not workers and (rollout.engine == "vllm" or (rollout.engine == "vllm_servers" and rollout.servers.started)):
        require_vllm()
        yield Diagnosis("packages", "ok", f"rollout.engine {rollout.engine!r} is installed")
    embedders = {"decontamination.embedding_model": config.decontamination.embedding_model}
    if config.replay.policy == "coreset":
        embedders["replay.coreset.model"] = config.replay.coreset.model
    for key, model in embedders.items():
        if model:
            load_embedder(model, key)
            yield Diagnosis("packages", "ok", f"{key} {model!r} loads")


def trackers(config: RunConfig) -> Iterable[Diagnosis]:
    """The packages of the trackers that are asked for are installed."""
    for name in require_trackers(config.tracking):
        yield Diagnosis("trackers", "ok", f"{name} is installed")


def run_directory(config: RunConfig) -> Iterable[Diagnosis]:
    """A new run can be made where the config says."""
    RunDirectory.check_free(config.run_dir)
    yield Diagnosis("run directory", "ok", f"{config.run_dir} is free")
