"""The certificate of an environment: what it is keyed by, where it is kept, and who asks for it.

A certificate belongs to a hash of what it was made of: the sampled tasks (prompts, hidden data, limits), the verifier,
and, for code that does not ship with AgentOPD, the source files of both. Change any of them and it no longer applies.
Those of the shipped environments ship with them; others are kept in ``$AGENTOPD_CACHE``, by default
``$XDG_CACHE_HOME/agentopd`` or ``~/.cache/agentopd``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from agentopd.build import Skill
from agentopd.errors import UserError
from agentopd.registry import verifiers
from agentopd.tracking import write_atomic
from agentopd.types import JSON, Record, Task, VersionedRecord

NUM_TASKS = 8
"""Tasks that stand for an environment."""
_SHIPPED_CODE = ("agentopd", "agentopd_envs", "agentopd_verifiers")


class Finding(Record):
    """What one check found."""

    check: str
    passed: bool
    detail: str = ""


class Certificate(VersionedRecord):
    """The result of validating one environment, source and verifier."""

    env: str
    source: str
    key: str
    verifiers: tuple[str, ...]
    num_tasks: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)


def sample_tasks(skill: Skill) -> list[Task]:
    """The tasks that stand for a skill, under the limits that its suite gives them."""
    return skill.tasks("train", NUM_TASKS, 0)


def verifier_name(skill: Skill, task: Task) -> str:
    """Registry name of the verifier that judges a task of this skill."""
    return skill.config.verifier or str(skill.env.verifier_for(task))  # type: ignore[attr-defined]


def certificate_key(skill: Skill, tasks: Sequence[Task]) -> str:
    """Hex digest (20 digits) of everything a certificate vouches for."""
    judges = [verifiers.get(name) for name in dict.fromkeys(verifier_name(skill, task) for task in tasks)]
    body: JSON = {
        "env": [skill.env.name, skill.env.version, _source_digest(skill.env)],
        "source": skill.config.source,
        "tasks": [task.hash for task in tasks],
        "verifiers": [[judge.name, judge.version, _source_digest(judge)] for judge in judges],
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:20]


def cache_directory() -> Path:
    """Where certificates of one's own environments are kept."""
    root = os.environ.get("AGENTOPD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else (Path(base) if base else Path.home() / ".cache") / "agentopd") / "certificates"


def find_certificate(key: str) -> Certificate | None:
    """The stored certificate with this key, shipped or made here."""
    made_here = cache_directory() / f"{key}.json"
    if made_here.is_file():
        return Certificate.model_validate_json(made_here.read_text())
    return next((item for item in shipped_certificates() if item.key == key), None)


def shipped_certificates() -> list[Certificate]:
    """The certificates that ship with AgentOPD."""
    paths = sorted((Path(str(files("agentopd"))) / "assets" / "certificates").glob("*.json"))
    return [Certificate.model_validate_json(path.read_text()) for path in paths]


def store_certificate(certificate: Certificate, folder: Path | None = None, verifier: str | None = None) -> Path:
    """Keep a certificate in the cache, by key, or in a folder of one's own, by name. Raises ``UserError``.

    ``verifier`` is the one that judges in the place of the environment's own.
    """
    plain = "".join(letter if letter.isalnum() else "_" for letter in certificate.env)
    readable = "-".join(part for part in (plain, certificate.source, verifier) if part)
    name = certificate.key if folder is None else readable
    path = (folder or cache_directory()) / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, certificate.model_dump_json(indent=2) + "\n")
    except OSError as exc:
        raise UserError(f"cannot keep the certificate at {str(path)!r} ({exc.strerror}): set AGENTOPD_CACHE") from None
    return path


def require_certificates(skills: Mapping[str, Skill], allowed: Collection[str] = ()) -> None:
    """Refuse to train on skills without a certificate, except those ``allowed`` by skill or environment name.

    Raises ``UserError`` naming the environment and what to run.
    """
    known = {name for skill in skills.values() for name in (skill.name, skill.config.env)}
    if strange := sorted(set(allowed) - known):
        raise UserError(f"--allow-uncertified {strange[0]!r} names no skill; the suite has: {', '.join(skills)}")
    for skill in skills.values():
        if not {skill.name, skill.config.env} & set(allowed) and not is_certified(skill):
            raise UserError(
                f"skill {skill.name!r}: environment {skill.config.env!r} is not certified as it is used here; run "
                f"`agentopd envs validate {how_to_validate(skill)}`, or pass --allow-uncertified {skill.name}"
            )


def is_certified(skill: Skill) -> bool:
    """Whether a certificate applies to the skill as its suite uses it."""
    return find_certificate(certificate_key(skill, sample_tasks(skill))) is not None


def how_to_validate(skill: Skill) -> str:
    """The arguments of ``agentopd envs validate`` that certify this skill; a suite's own settings need its file."""
    config = skill.config
    if config.verifier is not None or config.limits is not None:
        return "--suite FILE"
    source = "" if config.source == "micro" else f" --source {config.source}"
    return f"{config.env}{source}"


def _source_digest(target: type) -> str:
    """Digest of the files a class is written in; "" for code that ships with AgentOPD, which its version stands for."""
    digest = hashlib.sha256()
    paths = dict.fromkeys(_own_files(target.__mro__))
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16] if paths else ""


def _own_files(classes: Iterable[type]) -> Iterable[str]:
    for cls in classes:
        if cls.__module__.split(".")[0] in (*_SHIPPED_CODE, "builtins", "typing", "abc"):
            continue
        module = inspect.getmodule(cls)
        if module is not None and getattr(module, "__file__", None):
            yield str(module.__file__)
