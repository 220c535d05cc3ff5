"""Landlock: a second wall behind the mount namespace, where the kernel has it.

The rules name directories of the zygote's private root, so a descriptor or path that leads anywhere else is refused
even if a mount or a descriptor leaked. From ABI 4 TCP is refused, from ABI 6 signals and abstract sockets across the
sandbox's edge are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from ctypes import create_string_buffer

from agentopd_sandboxes.linux import syscall

_NR_CREATE_RULESET, _NR_ADD_RULE, _NR_RESTRICT_SELF = 444, 445, 446
_VERSION_QUERY = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_RIGHTS_LATEST = 16
_NET_TCP = 0b11
_SCOPED = 0b11


def abi() -> int:
    """The kernel's Landlock ABI, 0 where there is none."""
    try:
        return syscall("landlock", _NR_CREATE_RULESET, 0, 0, _VERSION_QUERY)
    except OSError:
        return 0


def build_ruleset(*writable: str, readable: Iterable[str] = ("/",)) -> int | None:
    """A ruleset descriptor: read ``readable``, use ``/dev``, write beneath ``writable``; None without Landlock."""
    version = abi()
    if version < 1:
        return None
    handled = (1 << _FS_RIGHTS_BY_ABI.get(version, _FS_RIGHTS_LATEST)) - 1
    attributes = struct.pack("=QQQ", handled, _NET_TCP, _SCOPED)
    size = 8 if version < 4 else 16 if version < 6 else 24
    buffer = create_string_buffer(attributes, len(attributes))
    ruleset = syscall("landlock_create_ruleset", _NR_CREATE_RULESET, buffer, size, 0)
    for path in readable:
        _allow(ruleset, path, _READ_FILE | _READ_DIR)
    _allow(ruleset, "/dev", _READ_FILE | _READ_DIR | _WRITE_FILE)
    for path in writable:
        _allow(ruleset, path, handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK))
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    where = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = create_string_buffer(struct.pack("=Qi", rights, where), 12)
        syscall(f"landlock_add_rule {path}", _NR_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(where)


def restrict(ruleset: int) -> None:
    """Confine the caller and its children for ever; needs ``no_new_privileges``."""
    syscall("landlock_restrict_self", _NR_RESTRICT_SELF, ruleset, 0)
