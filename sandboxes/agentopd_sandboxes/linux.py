"""The Linux calls that Python lacks, through ctypes: one thin function each, raising ``OSError`` with the call's name.

Runs in the zygote, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEW_ANY = 0x7E020080
"""Every flag that makes a namespace, the time namespace's included."""

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

ATTR_RDONLY = 1
ATTR_NOSUID = 2
ATTR_NODEV = 4
ATTR_NOEXEC = 8

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

_NR_CLOSE_RANGE = 436
_NR_MOUNT_SETATTR = 442
_NR_CLONE = {"x86_64": 56, "aarch64": 220}
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

MACHINE = os.uname().machine
SUPPORTED_MACHINES = tuple(_NR_CLONE)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_held = ctypes.PyDLL(None, use_errno=True)
"""The same library, called without giving up the interpreter's lock."""
_CAPABILITY_HEADER = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
_NO_CAPABILITIES = ctypes.create_string_buffer(24)
"""Made once, not in every cell: each size of a buffer is a new type."""


def _checked(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A raw system call; integers are passed as C longs."""
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _checked(what, _libc.syscall(ctypes.c_long(number), *longs))


def fork() -> int:
    """The C library's fork without Python's hooks, which write to so many pages that they cost more than the fork.

    The caller must be single-threaded; random number generators are not seeded anew.
    """
    return _checked("fork", _held.fork())


def clone(flags: int) -> int:
    """Fork into new namespaces: 0 in the child, its pid in the parent. The caller must be single-threaded."""
    child_signal = 17
    return syscall("clone", _NR_CLONE[MACHINE], flags | child_signal, 0, 0, 0, 0)


def close_from(lowest: int) -> None:
    """Close every descriptor from this one on; needs kernel 5.9."""
    syscall("close_range", _NR_CLOSE_RANGE, lowest, 0xFFFFFFFF, 0)


def unshare(flags: int) -> None:
    """Move the caller (its next child, for the pid namespace) into new namespaces."""
    _checked("unshare", _libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount ``source`` (or bind it, for an empty ``kind``) on ``target``."""
    what = f"mount {kind or 'bind'} on {target}"
    args = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _checked(what, _libc.mount(*args))


def umount(target: str, flags: int = 0) -> None:
    """Unmount ``target``."""
    _checked(f"umount {target}", _libc.umount2(target.encode(), flags))


def pivot_root(new_root: str, put_old: str) -> None:
    """Make ``new_root`` the root of this mount namespace, and leave the old one at ``put_old``."""
    syscall("pivot_root", _NR_PIVOT_ROOT[MACHINE], new_root.encode(), put_old.encode())


def restrict_mount(target: str, attributes: int, recursive: bool = False) -> None:
    """Add attributes to a mount, keeping those it has; needs kernel 5.12."""
    at_fdcwd, at_recursive = -100, 0x8000
    attr = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0), 32)
    flags = at_recursive if recursive else 0
    syscall(f"mount_setattr on {target}", _NR_MOUNT_SETATTR, at_fdcwd, target.encode(), flags, attr, 32)


def _prctl(what: str, option: int, argument: int) -> None:
    longs = (ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked(what, _libc.prctl(option, *longs))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends; reset by a change of uid."""
    _prctl("prctl(PDEATHSIG)", _PR_SET_PDEATHSIG, 9)


def make_dumpable(yes: bool = True) -> None:
    """Give this process's ``/proc`` files to its own uid, as they are not after a change of uid; or take them away."""
    _prctl("prctl(DUMPABLE)", _PR_SET_DUMPABLE, int(yes))


def no_new_privileges() -> None:
    """Forbid gaining privileges through exec, for ever."""
    _prctl("prctl(NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empty the caller's capability sets. The bounding set only matters to exec, which the filter refuses."""
    _checked("capset", _libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES))


def install_filter(program: bytes) -> None:
    """Install a seccomp BPF program (an array of 8-byte instructions) on the caller."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    _checked(
        "prctl(SECCOMP)",
        _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), fprog, ctypes.c_ulong(0), ctypes.c_ulong(0)),
    )
