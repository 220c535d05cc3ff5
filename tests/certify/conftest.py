"""Stages to run checks on, without a jail: programs are those of the tests themselves."""

import asyncio
import sys
import types

import pytest

from agentopd.build import Judge, Skill
from agentopd.certify.certificate import Finding, sample_tasks
from agentopd.certify.checks import CHECKS, run_check
from agentopd.certify.stage import Stage
from agentopd.config.run import SkillConfig
from agentopd.contracts import CaseResult, CaseStatus
from agentopd.registry import environments


class TrustingSandbox:
    """Runs cases in this very process."""

    name = "trusting"
    capabilities = frozenset({"none"})

    async def start(self):
        pass

    async def aclose(self):
        pass

    async def run_cases(self, program, cases, limits=None):
        if "judge.ini" in program.files:
            return [self._run_test(program.files, case.id) for case in cases]
        return [self._run(program.source, case) for case in cases]

    def _run_test(self, files, node):
        """One test of a suite, on modules made of the files; what would leave or patch the process is not run."""
        texts = {name.removeprefix("project/"): text for name, text in files.items() if name.startswith("project/")}
        if any("os._exit" in text or "_pytest" in text for text in texts.values()):
            return CaseResult(node, CaseStatus.NO_RESULT)
        try:
            for name in sorted((name for name in texts if not name.startswith("tests/")), key=len):
                module = types.ModuleType(name.removesuffix(".py").replace("/__init__", "").replace("/", "."))
                module.__path__ = []
                sys.modules[module.__name__] = module
                exec(texts[name], module.__dict__)
            path, _, test = node.partition("::")
            exec(f"{texts[path]}\n{test}()", {})
        except Exception as exc:
            return CaseResult(node, CaseStatus.EXCEPTION, detail=f"{type(exc).__name__}: {exc}")
        return CaseResult(node, CaseStatus.VALUE, [(node, when, "passed") for when in ("setup", "call", "teardown")])

    def _run(self, source, case):
        scope = {"args": list(case.args)}
        try:
            exec(f"{source}\n{case.setup}", scope)
            return CaseResult(case.id, CaseStatus.VALUE, eval(case.expression, scope))
        except Exception as exc:
            return CaseResult(case.id, CaseStatus.EXCEPTION, detail=f"{type(exc).__name__}: {exc}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTOPD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def examine():
    """``examine(env, verifier=None, source="micro", num=4, sandbox=TrustingSandbox)``: the first failure, or None."""

    async def first_failure(env, verifier, source, num, make_sandbox) -> Finding | None:
        sandbox = make_sandbox()
        loaded = environments.get(env) if isinstance(env, str) else env
        skill = Skill(SkillConfig(name="x", env=loaded.name, source=source, verifier=verifier), loaded)
        stage = Stage(skill, sample_tasks(skill)[:num], Judge([skill], sandbox))
        try:
            for check in CHECKS:
                if check.__name__ != "determinism" or num == 8:
                    finding = await run_check(check, stage)
                    if not finding.passed:
                        return finding
        finally:
            await sandbox.aclose()
        return None

    def examine(env, verifier=None, source="micro", num=4, sandbox=TrustingSandbox):
        return asyncio.run(first_failure(env, verifier, source, num, sandbox))

    return examine
