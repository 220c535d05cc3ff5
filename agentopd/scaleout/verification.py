"""Judges on other machines: verifier and sandbox together in a Ray actor, so that programs run there and not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentopd.config.scaleout import RayConfig
from agentopd.contracts import Case, CaseResult, Program, Sandbox, SandboxLimits, Verifier
from agentopd.errors import RegistryError, SandboxError
from agentopd.registry import environments, verifiers
from agentopd.scaleout.pool import ActorPool, Placement
from agentopd.types import Episode, Task, Verdict


class VerificationWorker:
    """What runs there. ``make_sandbox`` makes its sandbox, not started."""

    def __init__(self, make_sandbox: Callable[[], Sandbox]) -> None:
        self._sandbox = make_sandbox()
        self._verifiers: dict[str, Verifier] = {}

    async def start(self) -> tuple[str, frozenset[str]]:
        """Start the sandbox; its name and what isolation it has in force. Raises ``SandboxError``."""
        await self._sandbox.start()
        return self._sandbox.name, self._sandbox.capabilities

    async def ping(self) -> None:
        """It lives."""

    async def verify(self, env: str, name: str, task: Task, episode: Episode) -> Verdict:
        """The verdict of the verifier ``name``, which the environment ``env`` may register."""
        if name not in self._verifiers:
            self._verifiers[name] = _verifier(env, name)
        verifier = self._verifiers[name]
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
    """A ``Verifier`` whose work is done by a pool of ``VerificationWorker``."""

    version = "worker's"
    needs_sandbox = False

    def __init__(self, pool: ActorPool, env: str, name: str) -> None:
        self._pool, self._env, self.name = pool, env, name

    async def verify(self, task: Task, episode: Episode, sandbox: Sandbox | None) -> Verdict:
        """A worker's verdict. Raises ``SandboxError`` where worker after worker is lost."""
        verdict: Verdict = await self._pool.call("verify", self._env, self.name, task, episode)
        return verdict


class RaySandbox:
    """A ``Sandbox`` for environments, whose programs run where the pool's workers are."""

    name = "ray"

    def __init__(self, pool: ActorPool) -> None:
        self.pool = pool
        self._capabilities: frozenset[str] = frozenset()

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


def verification_pool(config: RayConfig, make_sandbox: Callable[[], Sandbox]) -> ActorPool:
    """The judges that ``config`` asks for. Raises ``ConfigError`` where there is no Ray."""
    placement = Placement(config.verification_workers, config.verification_resource)
    return ActorPool(VerificationWorker, (make_sandbox,), placement, config, SandboxError)


def _verifier(env: str, name: str) -> Verifier:
    try:
        found: Verifier = verifiers.get(name)()
    except RegistryError:
        environments.get(env)  # importing it registers what it brings along
        found = verifiers.get(name)()
    return found
