"""A package of one's own, ready to validate: what ``agentopd envs new`` writes."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from agentopd.errors import UserError
from agentopd.registry import environments


@dataclass(frozen=True)
class Package:
    """Where a package was written, and what to run next."""

    folder: Path
    next_steps: tuple[str, ...]


def write_package(name: str, parent: Path) -> Package:
    """Write ``parent/name`` from the templates in ``assets/scaffold``.

    Raises ``UserError`` for a name that cannot be a package or is taken, and for a folder that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} cannot name a package: use lower-case letters, digits and '_', as in my_env")
    folder = parent / name
    if folder.exists():
        raise UserError(f"{str(folder)!r} is there already: choose another name, or another --into")
    if name in environments.entries():
        raise UserError(f"environment {name!r} is registered already: choose another name")
    words = {"name": name, "class_name": "".join(part.title() for part in name.split("_"))}
    templates = Path(str(files("agentopd"))) / "assets" / "scaffold"
    for template in sorted(path for path in templates.rglob("*") if path.is_file()):
        target = folder / str(template.relative_to(templates)).removesuffix(".txt").replace("NAME", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(template.read_text()).substitute(words))
    steps = (f"pip install -e {folder}", f"agentopd envs validate {name}", f"agentopd envs play {name}")
    return Package(folder, steps)
