"""A jail shared by the tests of this folder, behind a plain function."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentopd.contracts import Case, CaseResult, Program, SandboxLimits
from agentopd.errors import SandboxError
from agentopd_sandboxes import JailSandbox
from agentopd_sandboxes.docker import Engine

Run = Callable[..., CaseResult]
StartPython = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def jail_works() -> None:
    """Skip where the kernel refuses, unless ``AGENTOPD_REQUIRE_JAIL`` says that it must not."""

    async def attempt() -> None:
        sandbox = JailSandbox(workers=1)
        try:
            await sandbox.start()
        finally:
            await sandbox.aclose()

    try:
        asyncio.run(attempt())
    except SandboxError as exc:
        if os.environ.get("AGENTOPD_REQUIRE_JAIL"):
            raise
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def run(jail_works: None) -> Iterator[Run]:
    """``run(source, expression, limits=None, **fields of Case)`` -> the one result."""
    loop = asyncio.new_event_loop()
    sandbox = JailSandbox(workers=2)

    def one(source: str, expression: str = "f()", limits: SandboxLimits | None = None, **case: Any) -> CaseResult:
        files = case.pop("files", {})
        cases = [Case("case", expression, **case)]
        (result,) = loop.run_until_complete(sandbox.run_cases(Program(source, files), cases, limits))
        return result

    yield one
    loop.run_until_complete(sandbox.aclose())
    loop.close()


@pytest.fixture(scope="session")
def docker_client() -> Iterator[Any]:
    """A client of the engine at ``DOCKER_HOST``; skips without one, unless ``AGENTOPD_REQUIRE_DOCKER`` is set."""
    engine = Engine(os.environ.get("DOCKER_HOST") or "")
    try:
        client = engine.client()
    except SandboxError as exc:
        if os.environ.get("AGENTOPD_REQUIRE_DOCKER"):
            raise
        pytest.skip(f"{exc} (see .ci/run for how to start one)")
    yield client
    engine.close()


@pytest.fixture(scope="session")
def start_python() -> StartPython:
    """Start a program in an interpreter of its own that finds what this one finds; its output is in one stream."""

    def start(source: str) -> "subprocess.Popen[str]":
        path = os.pathsep.join(filter(None, sys.path))
        return subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    return start
