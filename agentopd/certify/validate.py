"""Validation: every check on one skill, and the certificate that comes of it."""

from __future__ import annotations

from agentopd.build import Judge, Skill, build_sandbox, load_skills
from agentopd.certify.certificate import Certificate, certificate_key, sample_tasks, verifier_name
from agentopd.certify.checks import all_findings
from agentopd.certify.stage import Stage
from agentopd.config.run import SandboxConfig, SkillConfig, SuiteConfig
from agentopd.contracts import Sandbox
from agentopd.registry import environments


def skill_of(env: str, source: str | None = None) -> Skill:
    """An environment as a suite without further settings uses it; ``source`` defaults to its first."""
    chosen = source or getattr(environments.get(env), "sources", ("micro",))[0]
    suite = SuiteConfig(skills=(SkillConfig(name="environment", env=env, source=chosen),))
    return load_skills(suite)["environment"]


async def validate(skill: Skill, sandbox: Sandbox | None = None) -> Certificate:
    """Check one environment, source and verifier, as a suite entry uses them. Raises ``UserError`` for bad input.

    ``sandbox`` stays open; without one, the default backend is made and closed here.
    """
    own = build_sandbox(SandboxConfig(), [skill]) if sandbox is None else None
    tasks = sample_tasks(skill)
    try:
        stage = Stage(skill, tasks, Judge([skill], sandbox or own))  # type: ignore[arg-type]
        findings = await all_findings(stage)
    finally:
        if own is not None:
            await own.aclose()
    return Certificate(
        env=skill.config.env,
        source=skill.config.source,
        key=certificate_key(skill, tasks),
        verifiers=tuple(sorted({verifier_name(skill, task) for task in tasks})),
        num_tasks=len(tasks),
        findings=tuple(findings),
    )
