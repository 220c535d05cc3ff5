"""Why a namespace jail cannot start on this machine, and what to change."""

from __future__ import annotations

import errno
from pathlib import Path

_SYSCTLS = (
    ("kernel/unprivileged_userns_clone", "0", "run `sysctl -w kernel.unprivileged_userns_clone=1`"),
    ("user/max_user_namespaces", "0", "run `sysctl -w user.max_user_namespaces=10000`"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, or give Python an AppArmor profile",
    ),
)
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
_CONTAINER = (
    "in a container, start it with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined` "
    "(or a profile that permits unshare, clone, mount and pivot_root)"
)


def remedy(fault: str, number: int | None, sysctls: Path = Path("/proc/sys")) -> str:
    """The message of a ``SandboxError`` for a zygote that could not be set up: the fault, then the next actions."""
    actions = [action for name, bad, action in _SYSCTLS if _read(sysctls / name) == bad]
    if number == errno.ENOSYS:
        actions.append("use Linux 5.14 or newer")
    if number in (errno.ENOSPC, errno.EUSERS):
        actions.append("raise the user.max_*_namespaces sysctls, or close what else holds namespaces")
    if number in (errno.EPERM, errno.EACCES) and any(Path(mark).exists() for mark in _CONTAINER_MARKS):
        actions.append(_CONTAINER)
    if not actions:
        actions.append(f"allow unprivileged user namespaces; {_CONTAINER}")
    return f"the namespace jail cannot start here: {fault}. To use it, " + "; and ".join(dict.fromkeys(actions))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
