"""``agentopd sandbox``: run the shipped suite on every backend that is present, and remove what killed runs left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agentopd.contracts import Sandbox
from agentopd.errors import RegistryError, SandboxError
from agentopd.registry import sandboxes, verifiers
from agentopd.testing import CATALOGUE, LIMITS, SUBMISSIONS, Finding, check_sandbox, check_verifier

UNSAFE = "unsafe"
"""Named by hand or not at all."""
ROWS = len(CATALOGUE) + len(SUBMISSIONS)
"""Checks of one backend."""


@dataclass(frozen=True)
class BackendReport:
    """What the suite found on one backend; ``absent`` says why it could not start."""

    name: str
    findings: tuple[Finding, ...] = ()
    capabilities: tuple[str, ...] = ()
    absent: str = ""
    failures: tuple[Finding, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", tuple(finding for finding in self.findings if not finding.ok))


async def check_backends(names: Iterable[str] = (), advance: Callable[[], None] = lambda: None) -> list[BackendReport]:
    """Run the suite on the named backends, or on every registered one but ``unsafe``."""
    return [await _check(name, advance) for name in names or present()]


def present() -> list[str]:
    """The registered backends, without the one that isolates nothing."""
    return [name for name in sandboxes.entries() if name != UNSAFE]


async def _check(name: str, advance: Callable[[], None]) -> BackendReport:
    sandbox: Sandbox = sandboxes.get(name)(workers=2, limits=LIMITS)
    try:
        try:
            await sandbox.start()
        except SandboxError as exc:
            return BackendReport(name, absent=str(exc))
        findings = await check_sandbox(sandbox, CATALOGUE, advance)
        for judge in dict.fromkeys(row.verifier for row in SUBMISSIONS):
            findings += await check_verifier(verifiers.get(judge)(), sandbox, advance)
        return BackendReport(name, tuple(findings), tuple(sorted(sandbox.capabilities)))
    finally:
        await sandbox.aclose()


def prune() -> dict[str, list[str] | str]:
    """Have every backend remove what processes that no longer run left behind; by backend, what went, or why not."""
    found: dict[str, list[str] | str] = {}
    for name in present():
        try:
            backend = sandboxes.get(name)
        except RegistryError as exc:
            found[name] = str(exc)
            continue
        clean = inspect.getattr_static(backend, "prune", None)
        if clean is None:
            continue
        try:
            found[name] = backend.prune()
        except SandboxError as exc:
            found[name] = str(exc)
    return found
