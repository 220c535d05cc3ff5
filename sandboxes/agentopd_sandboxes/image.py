"""The Docker image: from a registry's Python where one can be reached, else from this machine's own interpreter.

Both ways end in the same Dockerfile. The offline base is the standard library of the running interpreter and the shared
libraries it is linked with, and nothing else: no shell, no package manager, no tools.
"""

from __future__ import annotations

import hashlib
import io
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agentopd.errors import SandboxError, UserError
from agentopd_sandboxes.slot import PACKAGE, interpreter

REPOSITORY = "agentopd-sandbox"
REGISTRY_BASE = "python:3.12-slim"
AGENT_HOME = "/opt/agentopd"
AGENT_FILES = (
    "agent", "bounds", "case", "confine", "landlock", "linux", "preload", "scales", "seccomp", "watch", "wire",
)  # fmt: skip
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "site-packages",
}
_COMPILED = f".{sys.implementation.cache_tag}.pyc"
"""Without them every container would compile the library anew."""
_ZONES = Path("/usr/share/zoneinfo")


def tag() -> str:
    """The image's name; it changes with what the image holds, so that an old image is never used by mistake."""
    digest = hashlib.sha256()
    for name in AGENT_FILES:
        digest.update((PACKAGE / f"{name}.py").read_bytes())
    for name in ("image.py", "image/Dockerfile"):
        digest.update((PACKAGE / name).read_bytes())
    return f"{REPOSITORY}:{digest.hexdigest()[:12]}"


def ensure(client: Any, source: str = "auto") -> str:
    """Build the image on the engine unless it is there; its name.

    ``source``: ``registry``, ``local``, or ``auto``, which takes the registry's base if the engine can have it.
    """
    name = tag()
    if not client.images.list(name=name):
        build(client, name, source)
    return name


def build(client: Any, name: str, source: str = "auto") -> None:
    """Build the image. Raises ``UserError`` for an unknown source, ``SandboxError`` if the engine refuses."""
    import docker.errors

    if source not in ("auto", "registry", "local"):
        raise UserError(f"unknown image source {source!r}; give auto, registry or local")
    base = REGISTRY_BASE if source == "registry" or (source == "auto" and _can_pull(client)) else ""
    try:
        if not base:
            base = f"{REPOSITORY}-base:local"
            client.api.import_image_from_data(_tar(_interpreter_files()), repository=f"{REPOSITORY}-base", tag="local")
        context = _tar(_context_files())
        lines = client.api.build(
            fileobj=io.BytesIO(context), custom_context=True, tag=name, buildargs={"BASE": base}, rm=True, decode=True
        )
        faults = [line["error"] for line in lines if "error" in line]
    except docker.errors.DockerException as exc:
        raise SandboxError(f"building the sandbox image: {exc}") from exc
    if faults:
        raise SandboxError(f"building the sandbox image on {base}: {faults[0].strip()}")


def _can_pull(client: Any) -> bool:
    """Whether the engine has the registry's base, or can fetch it."""
    import docker.errors

    try:
        client.images.get(REGISTRY_BASE)
    except docker.errors.DockerException:
        try:
            client.images.pull(*REGISTRY_BASE.split(":"))
        except (docker.errors.DockerException, OSError):
            return False
    return True


def _tar(files: Iterable[tuple[str, Path | bytes | str | None]]) -> bytes:
    """An archive of (name, file, bytes, ``str`` for a link's target, or None for a directory), owned by root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, what in files:
            info = tarfile.TarInfo(name.lstrip("/"))
            info.mode = 0o755
            if what is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(what, str):
                info.type, info.linkname = tarfile.SYMTYPE, what
            else:
                data = what if isinstance(what, bytes) else what.read_bytes()
                info.size = len(data)
                info.mtime = 0 if isinstance(what, bytes) else int(what.stat().st_mtime)  # compiled files quote it
                archive.addfile(info, io.BytesIO(data))
                continue
            archive.addfile(info)
    return out.getvalue()


def _context_files() -> Iterator[tuple[str, Path | bytes | str | None]]:
    yield "Dockerfile", PACKAGE / "image/Dockerfile"
    for folder in ("rootfs", "rootfs/work", "rootfs/opt"):
        yield folder, None
    for name in AGENT_FILES:
        home = f"rootfs{AGENT_HOME}/agentopd_sandboxes"
        yield f"{home}/{name}.py", PACKAGE / f"{name}.py"
        yield f"{home}/__pycache__/{name}{_COMPILED}", _compiled(PACKAGE / f"{name}.py")


def _compiled(path: Path) -> bytes:
    with tempfile.TemporaryDirectory(prefix="agentopd-image-") as folder:
        made = f"{folder}/out.pyc"
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(path), made, doraise=True, invalidation_mode=mode)
        return Path(made).read_bytes()


def _interpreter_files() -> Iterator[tuple[str, Path | bytes | str | None]]:
    binary = Path(interpreter()).resolve()
    standard = Path(sysconfig.get_paths(vars={"base": str(binary.parent.parent)})["stdlib"])
    yield "/usr/local/bin/python3", str(binary)
    yield "/tmp", None
    yield str(binary), binary
    linked = [binary]
    for folder, folders, names in os.walk(standard):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in (".py", ".so", ".txt") or name.endswith(_COMPILED):
                yield str(path), path
            if path.suffix == ".so":
                linked.append(path)
    for library in sorted({*_libraries(linked)}):
        yield library, Path(library)
    for path in sorted(_ZONES.rglob("*")) if _ZONES.is_dir() else ():
        if path.is_file():
            yield str(path), path


def _libraries(binaries: list[Path]) -> Iterator[str]:
    """Shared libraries that the given files are linked with, by the paths at which they are looked for."""
    for start in range(0, len(binaries), 100):
        batch = [str(path) for path in binaries[start : start + 100]]
        text = subprocess.run(["ldd", *batch], capture_output=True, text=True).stdout
        yield from re.findall(r"(?:=> |^\s+)(/\S+) \(0x", text, re.MULTILINE)
