"""The system-call filter, assembled here: no library, no compiler.

A deny-list with a ceiling: calls that open kernel attack surface, leave the sandbox, start programs or hold memory
outside every limit are refused with EPERM, and every call newer than the ceiling does not exist (ENOSYS), so a kernel
upgrade never widens the sandbox. Numbers are from the kernel's unistd tables for x86_64 and the generic ABI (aarch64).
"""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Collection

from agentopd_sandboxes.linux import CLONE_NEW_ANY

CEILING = 452
"""``fchmodat2``, Linux 6.6: the last call that C libraries in use today may need."""

_ABSENT = -1

_DENIED: dict[str, tuple[int, int]] = {
    # start programs: nothing executable is in the root, and nothing needs to be
    "execve": (59, 221),
    "execveat": (322, 281),
    # namespaces and mounts
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # kernel attack surface that no case needs
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "remap_file_pages": (216, 234),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "modify_ldt": (154, _ABSENT),
    "personality": (135, 92),
    "uselib": (134, _ABSENT),
    "ustat": (136, _ABSENT),
    "sysfs": (139, _ABSENT),
    "_sysctl": (156, _ABSENT),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    # the machine
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "iopl": (172, _ABSENT),
    "ioperm": (173, _ABSENT),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    # memory that outlives a process or escapes its limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}

_CONTAINER_NEEDS = {"execve", "execveat", "memfd_create", "chroot", "pivot_root", "mount", "umount2", "sethostname"}

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_CLONE = (56, 220)
_CLONE3 = 435
_SOCKET = (41, 198)
_SOCKETPAIR = (53, 199)
_IOCTL = (16, 29)
_TTY_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_AF_UNIX = 1
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
}
"""Calls that reach another process by the number in their first argument."""
_ON_OTHERS = {
    "prlimit64": (302, 261),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
}
"""Calls that a case may make on itself (first argument 0) and on nobody else."""
EVERYBODY = -1

_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NR_AT, _ARCH_AT, _ARG0_AT, _ARG1_AT = 0, 4, 16, 24
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_LEAF = 4
"""Call numbers that are compared one by one."""


def _refuse(number: int) -> int:
    return 0x00050000 | number


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _when(argument: int, test: int, value: int, verdict: int) -> bytes:
    """Return ``verdict`` if the low word of an argument passes the test; leaves the call number loaded."""
    return _op(_LOAD, argument) + _op(test, value, if_false=1) + _op(_RETURN, verdict) + _op(_LOAD, _NR_AT)


def _for_call(number: int, body: bytes) -> bytes:
    return _op(_JUMP_EQ, number, if_false=len(body) // 8) + body


def _search(numbers: list[int]) -> bytes:
    """Refuse the loaded call number if it is among these sorted ones, else allow it.

    A search and not a list, because the kernel tries every call number on a filter that is put on.
    """
    if len(numbers) <= _LEAF:
        hits = (_op(_JUMP_EQ, number, if_true=len(numbers) - at) for at, number in enumerate(numbers))
        return b"".join(hits) + _op(_RETURN, _ALLOW) + _op(_RETURN, _refuse(errno.EPERM))
    half = len(numbers) // 2
    low, high = _search(numbers[:half]), _search(numbers[half:])
    return _op(_JUMP_GT, numbers[half - 1], if_true=len(low) // 8) + low + high


def build_filter(machine: str, guarded: Collection[int] = (), first: bool = False) -> bytes:
    """The BPF program for ``x86_64`` or ``aarch64``.

    With ``guarded`` pids, signals to those and to all are refused. ``first``: the caller will be the first process of
    its pid namespace, on which SIGKILL from inside has no effect; one that kills itself shall die as any other does.
    """
    column = _COLUMN[machine]
    out_of_reach = b"".join(
        _when(_ARG0_AT, _JUMP_EQ, pid & 0xFFFFFFFF, _refuse(errno.EPERM))
        for pid in {EVERYBODY, *guarded, *(-pid for pid in guarded)}
    )
    itself = (
        _op(_LOAD, _ARG0_AT) + _op(_JUMP_EQ, 0, if_true=1) + _op(_RETURN, _refuse(errno.EPERM)) + _op(_LOAD, _NR_AT)
    )
    denied = sorted({numbers[column] for numbers in _DENIED.values()} - {_ABSENT})
    not_unix = (
        _op(_LOAD, _ARG0_AT)
        + _op(_JUMP_EQ, _AF_UNIX, if_true=1)
        + _op(_RETURN, _refuse(errno.EACCES))
        + _op(_LOAD, _NR_AT)
    )
    suicide = (
        _op(_LOAD, _ARG1_AT)
        + _op(_JUMP_EQ, signal.SIGKILL, if_false=3)
        + _op(_LOAD, _ARG0_AT)
        + _op(_JUMP_EQ, 1, if_false=1)
        + _op(_RETURN, _KILL)
        + _op(_LOAD, _NR_AT)
    )
    injection = b"".join(_when(_ARG1_AT, _JUMP_EQ, code, _refuse(errno.EPERM)) for code in _TTY_INJECTION)
    return b"".join(
        (
            _op(_LOAD, _ARCH_AT),
            _op(_JUMP_EQ, _AUDIT_ARCH[machine], if_true=1),
            _op(_RETURN, _KILL),
            _op(_LOAD, _NR_AT),
            # the ceiling also refuses the x32 ABI, whose numbers start at 2**30
            _op(_JUMP_GT, CEILING, if_false=1),
            _op(_RETURN, _refuse(errno.ENOSYS)),
            # its flags are behind a pointer, out of a filter's sight; C libraries fall back to clone
            _for_call(_CLONE3, _op(_RETURN, _refuse(errno.ENOSYS))),
            _for_call(_CLONE[column], _when(_ARG0_AT, _JUMP_SET, CLONE_NEW_ANY, _refuse(errno.EPERM))),
            _for_call(_SOCKET[column], not_unix),
            _for_call(_SOCKETPAIR[column], not_unix),
            _for_call(_IOCTL[column], injection),
            _for_call(_SIGNALS["kill"][column], suicide) if first else b"",
            *(_for_call(numbers[column], out_of_reach) for numbers in _SIGNALS.values() if guarded),
            *(_for_call(numbers[column], itself) for numbers in _ON_OTHERS.values()),
            _search(denied),
        )
    )


def container_profile() -> dict[str, object]:
    """The same deny-list as a profile for container engines, less what starting a container needs.

    It stands behind the filter that every case puts on itself, and covers the agent too.
    """
    names = sorted(set(_DENIED) - _CONTAINER_NEEDS)
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}],
    }
