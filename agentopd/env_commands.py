"""What the ``agentopd envs`` commands do."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from agentopd.config import load_run_config, load_suite
from agentopd.console import make_console
from agentopd.errors import AgentOPDError, ConfigError, UserError
from agentopd.registry import environments

if TYPE_CHECKING:
    from agentopd.build import Skill
    from agentopd.certify import Certificate


@dataclass(frozen=True)
class What:
    """Which environments to validate: one by name, every installed one, or those of a suite."""

    name: str | None
    every: bool
    source: str | None
    suite: Path | None


def envs_list(plain: bool) -> None:
    """``agentopd envs list``."""
    table = Table("environment", "from", "sources", "certified", header_style="bold", pad_edge=False)
    for name, claims in environments.entries().items():
        origins = " and ".join(claim.origin for claim in claims)
        try:
            sources, certified = ", ".join(getattr(environments.get(name), "sources", ())), _certified(name)
        except AgentOPDError as exc:
            sources, certified = "–", f"broken: {exc}"
        table.add_row(*map(Text, (name, origins, sources, certified)))
    make_console(plain).print(table)


def envs_describe(name: str, source: str | None) -> None:
    """``agentopd envs describe``."""
    from agentopd.certify import certificate_key, find_certificate, skill_of
    from agentopd.certify.certificate import how_to_validate, sample_tasks

    skill = skill_of(name, source)
    env: Any = skill.env
    task = next(iter(env.load_tasks("eval", skill.config.source, 1, 0)))
    certificate = find_certificate(certificate_key(skill, sample_tasks(skill)))
    options: dict[str, Any] = getattr(env, "tool_options", dict)()
    missing = f"none; run: agentopd envs validate {how_to_validate(skill)}"
    summary = {
        "name": env.name,
        "version": env.version,
        "about": (env.__doc__ or "").strip(),
        "sources": list(getattr(env, "sources", ())),
        "verifier": env.verifier_for(task),
        "tools": [{**schema.model_dump(), **_options(options.get(schema.name))} for schema in env.tool_schemas(task)],
        "limits": task.limits.model_dump(),
        "certificate": {item.check: item.detail for item in certificate.findings} if certificate else missing,
        "example": [message.model_dump(exclude_defaults=True) for message in task.prompt],
    }
    print(json.dumps(summary, indent=2, ensure_ascii=False))


def envs_new(name: str, into: Path) -> None:
    """``agentopd envs new``."""
    from agentopd.scaffold import write_package

    package = write_package(name, into)
    print(f"wrote {package.folder}")
    for step in package.next_steps:
        print(f"  {step}")


def envs_validate(what: What, into: Path | None, as_json: bool, plain: bool) -> None:
    """``agentopd envs validate``."""
    from agentopd.certify.certificate import store_certificate

    console = make_console(plain or as_json, stderr=as_json)
    proven, skipped = asyncio.run(_validate(_chosen(what), what.every))
    certificates = [certificate for _, certificate in proven]
    for skill, certificate in proven:
        if certificate.passed:
            store_certificate(certificate, into, skill.config.verifier)
        console.print(_findings(certificate))
    for line in skipped:
        console.print(f"skipped {line}", markup=False)
    if as_json:
        print(json.dumps([item.model_dump(mode="json") | {"passed": item.passed} for item in certificates]))
    if not all(certificate.passed for certificate in certificates):
        raise SystemExit(1)


def envs_play(name: str, source: str | None, seed: int, plain: bool) -> None:
    """``agentopd envs play``."""
    from agentopd.certify import skill_of
    from agentopd.play import play

    asyncio.run(play(skill_of(name, source), seed, make_console(plain)))


def _chosen(what: What) -> list[Skill]:
    from agentopd.build import load_skills
    from agentopd.certify import skill_of

    if sum((what.name is not None, what.every, what.suite is not None)) != 1:
        raise UserError("give one of: NAME, --all, --suite FILE")
    if what.name is not None:
        return [skill_of(what.name, what.source)]
    if what.source is not None:
        raise UserError("--source goes with a NAME")
    if what.suite is not None:
        try:
            suite = load_suite(what.suite)
        except ConfigError:
            suite = load_run_config(what.suite).suite
        return list(load_skills(suite).values())
    names = environments.entries()
    return [skill_of(name, source) for name in names for source in getattr(environments.get(name), "sources", [None])]


async def _validate(skills: list[Skill], lenient: bool) -> tuple[list[tuple[Skill, Certificate]], list[str]]:
    """Skills with their certificates, and what was skipped for want of its files; only ``lenient`` callers skip."""
    from agentopd.build import build_sandbox
    from agentopd.certify import validate
    from agentopd.config.run import SandboxConfig

    proven, skipped = [], []
    sandbox = build_sandbox(SandboxConfig())
    try:
        for skill in skills:
            try:
                # One that needs libraries gets a sandbox of its own: the others are proven without them.
                own_sandbox = bool(getattr(skill.env, "libraries", ()))
                proven.append((skill, await validate(skill, None if own_sandbox else sandbox)))
            except ConfigError as exc:
                if not lenient:
                    raise
                skipped.append(f"{skill.config.env}, source {skill.config.source}: {exc}")
    finally:
        await sandbox.aclose()
    return proven, skipped


def _findings(certificate: Certificate) -> Table:
    verdict = "certified" if certificate.passed else "NOT certified"
    table = Table(title=f"{certificate.env}, source {certificate.source}: {verdict}", title_justify="left", box=None)
    table.add_column()
    table.add_column("check", style="bold")
    table.add_column("finding", overflow="fold")
    for item in certificate.findings:
        table.add_row(Text("ok" if item.passed else "FAIL", style="green" if item.passed else "red"), item.check,
                      Text(item.detail))  # fmt: skip
    return table


def _certified(name: str) -> str:
    from agentopd.certify import skill_of
    from agentopd.certify.certificate import is_certified

    sources = getattr(environments.get(name), "sources", ("micro",))
    found = []
    for source in sources:
        try:
            found += [source] if is_certified(skill_of(name, source)) else []
        except ConfigError:
            continue  # Its files are not here.
    return ", ".join(found) or "no"


def _options(options: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if value} if options else {}
