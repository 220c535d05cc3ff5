"""The sandbox that is none: it works, it says what it is, and the suite sees through it."""

import asyncio

import pytest

from agentopd.build import build_sandbox
from agentopd.config.run import SandboxConfig
from agentopd.contracts import Case, CaseStatus, Program, Sandbox, SandboxLimits
from agentopd.errors import ConfigError
from agentopd.testing import HONEST, HOSTILE, check_sandbox
from agentopd_sandboxes.unsafe import UnsafeSandbox


def test_it_evaluates_calls_and_says_what_it_is() -> None:
    sandbox = UnsafeSandbox(workers=2)
    assert isinstance(sandbox, Sandbox)
    assert (sandbox.name, sandbox.capabilities) == ("unsafe", {"unsafe"})
    cases = [Case("a", "f(*args)", args=(20,)), Case("b", "1/0"), Case("c", "exit()"), Case("d", "time.sleep(9)")]
    program = Program(
        "import time\nfrom helper import g\ndef f(n): return g(n) + 2", {"helper.py": "def g(n): return 2 * n"}
    )
    results = asyncio.run(sandbox.run_cases(program, cases, SandboxLimits(wall_s=2.0)))
    assert [(result.id, result.status, result.value) for result in results] == [
        ("a", CaseStatus.VALUE, 42),
        ("b", CaseStatus.EXCEPTION, None),
        ("c", CaseStatus.EXCEPTION, None),
        ("d", CaseStatus.TIMEOUT, None),
    ]


@pytest.mark.slow
def test_the_suite_tells_a_sandbox_from_none() -> None:
    leaky = {"C34", "D42", "F62", "F63"}
    rows = [row for row in (*HOSTILE, *HONEST) if row.id in leaky | {"A1", "B11", "E51", "H1"}]
    findings = asyncio.run(check_sandbox(UnsafeSandbox(workers=1), rows))
    assert {finding.id for finding in findings if not finding.ok} == leaky | {"host"}


def test_settings_a_backend_does_not_have_are_refused() -> None:
    config = SandboxConfig(backend="jail", runtime="runsc")
    with pytest.raises(ConfigError, match=r"sandbox\.runtime has no effect on the backend 'jail'"):
        build_sandbox(config)
    assert build_sandbox(SandboxConfig(backend="docker", hosts=("unix:///a", "tcp://b:1"))).name == "docker"
