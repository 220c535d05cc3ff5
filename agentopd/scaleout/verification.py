"""Judges on other machines: verifier and sandbox together in a Ray actor, so that programs run there and not here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import ClassVar

from agentopd.config.run import SandboxConfig
from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Case, CaseResult, Program, Sandbox, SandboxLimits, Verifier
from agentopd.errors import ConfigError, RegistryError, SandboxError
from agentopd.registry import environments, sandboxes, verifiers
from agentopd.scaleout.pool import ActorPool, Placement
from agentopd.types import Episode, Task, Verdict


def local_sandbox(config: SandboxConfig, libraries: Mapping[str, str]) -> Sandbox:
    """A backend in this process, not started; ``libraries`` leads from a package to a skill that needs it.

    Raises ``ConfigError`` for a setting that the backend does not have.
    """
    workers = config.workers or os.cpu_count() or 1
    limits = SandboxLimits(wall_s=config.wall_s, cpu_s=config.wall_s, memory_mb=config.memory_mb)
    backend = sandboxes.get(config.backend)
    options = {key: value for key in ("hosts", "runtime") if (value := getattr(config, key))}
    known = signature(backend).parameters.keys()
    for key in options.keys() - known:
        raise ConfigError(f"sandbox.{key} has no effect on the backend {config.backend!r}; leave it out")
    if libraries and "libraries" not in known:
        name, skill = next(iter(libraries.items()))
        raise ConfigError(
            f"skill {skill!r} needs the library {name!r} in the sandbox, which the backend {config.backend!r} "
            "cannot offer; use the jail"
        )
    if libraries:
        options["libraries"] = tuple(libraries)
    sandbox: Sandbox = backend(workers=workers, limits=limits, **options)
    return sandbox


class VerificationWorker:
    """What runs there: one sandbox, and verifiers as they are asked for."""

    def __init__(self, config: SandboxConfig, libraries: Mapping[str, str]) -> None:
        self._sandbox = local_sandbox(config, libraries)
        self._verifiers: dict[str, Verifier] = {}

    async def start(self) -> tuple[str, frozenset[str]]:
        """Start the sandbox; its name and what isolation it has in force. Raises ``SandboxError``."""
        await self._sandbox.start()
        return self._sandbox.name, self._sandbox.capabilities

    async def ping(self) -> None:
        """It lives."""

    async def verify(self, env: str, key: str, task: Task, episode: Episode) -> Verdict:
        """The verdict of the verifier registered as ``key``, maybe by the environment ``env``."""
        if key not in self._verifiers:
            self._verifiers[key] = _verifier(env, key)
        verifier = self._verifiers[key]
        return await verifier.verify(task, episode, self._sandbox if verifier.needs_sandbox else None)

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None
    ) -> list[CaseResult]:
        """As a sandbox does."""
        return await self._sandbox.run_cases(program, cases, limits)

    async def aclose(self) -> None:
        """Kill what runs in the sandbox."""
        await self._sandbox.aclose()


class RayVerifier:
    """A ``Verifier`` whose work is done by a pool of ``VerificationWorker``; ``key`` is what the registry calls it."""

    name: ClassVar[str] = "ray"
    version: ClassVar[str] = ""
    needs_sandbox: ClassVar[bool] = False

    def __init__(self, pool: ActorPool, env: str, key: str) -> None:
        self._pool, self._env, self._key = pool, env, key

    @classmethod
    def instead_of(cls, verifier: Verifier, pool: ActorPool, env: str, key: str) -> RayVerifier:
        """One that goes by the name of ``verifier``, whose faults are told by it."""
        named: type[RayVerifier] = type(cls.__name__, (cls,), {"name": verifier.name, "version": verifier.version})
        return named(pool, env, key)

    async def verify(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Verdict:
        """A worker's verdict. Raises ``SandboxError`` where worker after worker is lost."""
        verdict: Verdict = await self._pool.call("verify", self._env, self._key, task, episode)
        return verdict


class RaySandbox:
    """A ``Sandbox`` for environments, whose programs run where the pool's workers are."""

    name: ClassVar[str] = "ray"

    def __init__(self, pool: ActorPool) -> None:
        self.pool = pool
        """Of ``VerificationWorker``."""
        self._capabilities: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ray: RayConfig, config: SandboxConfig, libraries: Mapping[str, str]) -> RaySandbox:
        """The judges that ``ray`` asks for, each with the sandbox of ``config``. Raises ``ConfigError`` without Ray."""
        placement = Placement(ray.verification_workers, ray.verification_resource)
        return cls(ActorPool(VerificationWorker, (config, dict(libraries)), placement, ray, SandboxError))

    @property
    def capabilities(self) -> frozenset[str]:
        """What every worker's sandbox has in force."""
        return self._capabilities

    async def start(self) -> None:
        """Start the workers and their sandboxes. Raises ``SandboxError``."""
        started = await self.pool.start()
        self._capabilities = frozenset.intersection(*(capabilities for _, capabilities in started))

    async def run_cases(
        self, program: Program, cases: Sequence[Case], limits: SandboxLimits | None = None
    ) -> list[CaseResult]:
        """All cases of a program on one worker, in order."""
        results: list[CaseResult] = await self.pool.call("run_cases", program, list(cases), limits)
        return results

    async def aclose(self) -> None:
        """End the workers."""
        await self.pool.aclose()


def _verifier(env: str, key: str) -> Verifier:
    try:
        found: Verifier = verifiers.get(key)()
    except RegistryError:
        environments.get(env)  # importing it registers what it brings along
        found = verifiers.get(key)()
    return found
