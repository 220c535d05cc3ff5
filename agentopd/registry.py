"""Names to things: entry points, decorators, and ``file.py:Class`` paths.

Entry points are listed without importing them and imported on first use. A name claimed twice is an error that names
both sides, raised when that name is looked up; a plugin that fails to import is reported by ``describe`` and fatal
only to whoever asks for it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from agentopd.errors import RegistryError

T = TypeVar("T")
GROUPS = ("environments", "verifiers", "sandboxes", "datasets", "tool_codecs", "suites")


@dataclass(frozen=True)
class Entry:
    """One registered name: where it comes from, and how to get it."""

    name: str
    origin: str
    load: Callable[[], Any]


class Registry:
    """The names of one kind, ``environments`` say."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._local: dict[str, list[Entry]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make a class (or a loader function) available under ``name``.

        A class that has no ``name`` of its own gets this one.
        """

        def decorate(target: T) -> T:
            if isinstance(target, type) and "name" not in vars(target):
                target.name = name  # type: ignore[attr-defined]
            origin = f"{target.__module__}:{target.__qualname__}"  # type: ignore[attr-defined]
            others = [entry for entry in self._local.get(name, []) if entry.origin != origin]
            self._local[name] = [*others, Entry(name, origin, lambda: target)]
            return target

        return decorate

    def entries(self) -> dict[str, list[Entry]]:
        """Every known name with all who claim it; nothing is imported."""
        found: dict[str, list[Entry]] = {name: list(claims) for name, claims in self._local.items()}
        for target, entry in _installed(self.group, tuple(sys.path)):
            claims = found.setdefault(entry.name, [])
            if all(claim.origin != target for claim in claims):
                claims.append(entry)
        return {name: _distinct(claims) for name, claims in sorted(found.items())}

    def get(self, name: str) -> Any:
        """The object registered as ``name``, or at ``package.module:Attr`` / ``path/to/file.py:Attr``."""
        if ":" in name:
            return load_path(name)
        claims = self.entries().get(name, [])
        if not claims:
            raise RegistryError(f"unknown {self._singular} {name!r}{self._hint(name)}")
        if len(claims) > 1:
            both = " and ".join(claim.origin for claim in claims)
            raise RegistryError(f"{self._singular} {name!r} is registered twice, by {both}; uninstall or rename one")
        try:
            return claims[0].load()
        except RegistryError:
            raise
        except Exception as exc:
            raise RegistryError(
                f"{self._singular} {name!r} from {claims[0].origin} cannot be imported: {type(exc).__name__}: {exc}"
            ) from exc

    @property
    def _singular(self) -> str:
        plural = self.group.replace("_", " ")
        return plural.removesuffix("es") if plural.endswith("xes") else plural.removesuffix("s")

    def _hint(self, name: str) -> str:
        names = sorted(self.entries())
        close = get_close_matches(name, names, n=1)
        known = ", ".join(names) or "none"
        return f"; did you mean {close[0]!r}? (known: {known})" if close else f"; known: {known}"


@lru_cache(maxsize=64)
def _installed(group: str, path: tuple[str, ...]) -> list[tuple[str, Entry]]:
    """Entry points of the distributions on ``path`` (``sys.path``), with what each names; reading them is slow."""
    found = []
    for point in entry_points(group=f"agentopd.{group}"):
        owner = f" ({point.dist.name})" if point.dist else ""
        found.append((point.value, Entry(point.name, point.value + owner, point.load)))
    return found


def _distinct(claims: list[Entry]) -> list[Entry]:
    """Drop a decorator's claim where an entry point already names the same class."""
    seen: dict[str, Entry] = {}
    for claim in claims:
        seen.setdefault(claim.origin.split(" ")[0], claim)
    return list(seen.values())


def load_path(path: str) -> Any:
    """Import ``package.module:Attr`` or ``path/to/file.py:Attr``."""
    where, _, attribute = path.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise RegistryError(f"{path!r}: no such file {where!r}") from None
    except ImportError as exc:
        raise RegistryError(f"{path!r} cannot be imported: {exc}") from exc
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise RegistryError(f"{where!r} has no {attribute!r}") from None


def _load_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"agentopd_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RegistryError(f"{str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


environments = Registry("environments")
verifiers = Registry("verifiers")
sandboxes = Registry("sandboxes")
datasets = Registry("datasets")
tool_codecs = Registry("tool_codecs")
suites = Registry("suites")

register_environment = environments.register
register_verifier = verifiers.register
