"""The filter, run by a small interpreter of its instruction set, so that both machines are checked on either."""

import errno
import struct

import pytest

from agentopd_sandboxes.seccomp import _DENIED, CEILING, build_filter

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
CALLS = {  # name: numbers on x86_64 and aarch64
    "read": (0, 63),
    "write": (1, 64),
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "execve": (59, 221),
    "mount": (165, 40),
    "ptrace": (101, 117),
    "openat": (257, 56),
    "futex": (202, 98),
    "exit_group": (231, 94),
    "prctl": (157, 167),
    "mmap": (9, 222),
}


def evaluate(program: bytes, number: int, arch: int, *args: int) -> int:
    data = struct.pack("<IIQ6Q", number, arch, 0, *(*args, *[0] * (6 - len(args))))
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        else:
            hit = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[code]
            at += if_true if hit else if_false


def refused(number: int) -> int:
    return 0x00050000 | number


@pytest.mark.parametrize("machine", ARCH)
def test_verdicts(machine: str) -> None:
    program, arch = build_filter(machine), ARCH[machine]

    def verdict(name: str, *args: int) -> int:
        return evaluate(program, CALLS[name][machine == "aarch64"], arch, *args)

    for name in ("read", "write", "openat", "futex", "exit_group", "prctl", "mmap"):
        assert verdict(name) == ALLOW, name
    for name in ("execve", "mount", "ptrace"):
        assert verdict(name) == refused(errno.EPERM), name
    assert verdict("clone", 0x01200011) == ALLOW  # fork, as C libraries spell it
    for flag in (0x00000080, 0x00020000, 0x02000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict("clone", flag | 17) == refused(errno.EPERM), hex(flag)
    assert verdict("clone3") == refused(errno.ENOSYS)
    for name in ("socket", "socketpair"):
        assert verdict(name, 1) == ALLOW
        assert {verdict(name, family) for family in (2, 10, 16, 17, 40)} == {refused(errno.EACCES)}
    assert verdict("ioctl", 0, 0x5401) == ALLOW
    assert verdict("ioctl", 0, 0x5412) == verdict("ioctl", 0, 0x541C) == refused(errno.EPERM)
    assert evaluate(program, CEILING + 1, arch) == refused(errno.ENOSYS)
    assert evaluate(program, 1 << 30, arch) == refused(errno.ENOSYS)
    assert evaluate(program, 0, 0x40000003) == KILL


@pytest.mark.parametrize("machine", ARCH)
def test_the_program_fits_the_kernel(machine: str) -> None:
    program = build_filter(machine)
    assert len(program) % 8 == 0 and len(program) // 8 <= 4096


@pytest.mark.parametrize("machine", ARCH)
def test_guarded_processes_cannot_be_signalled(machine: str) -> None:
    column = machine == "aarch64"
    program, arch = build_filter(machine, guarded=(1, 7)), ARCH[machine]
    for numbers in ((62, 129), (200, 130), (234, 131), (434, 434)):
        for pid in (1, 7, -1, -7):
            assert evaluate(program, numbers[column], arch, pid & 0xFFFFFFFF) == refused(errno.EPERM)
        assert evaluate(program, numbers[column], arch, 8) == ALLOW
        assert evaluate(build_filter(machine), numbers[column], arch, 7) == ALLOW
    for numbers in ((302, 261), (203, 122)):
        assert evaluate(program, numbers[column], arch, 7) == refused(errno.EPERM)
        assert evaluate(program, numbers[column], arch, 0) == ALLOW


@pytest.mark.parametrize("machine", ARCH)
def test_every_denied_call_is_refused_and_no_other(machine: str) -> None:
    program, arch = build_filter(machine), ARCH[machine]
    denied = {numbers[machine == "aarch64"] for numbers in _DENIED.values()}
    special = {CALLS[name][machine == "aarch64"] for name in ("clone", "clone3", "socket", "socketpair", "ioctl")}
    for number in set(range(CEILING + 1)) - special:
        # on itself, as the calls that reach other processes are allowed
        assert (evaluate(program, number, arch) == refused(errno.EPERM)) == (number in denied), number


@pytest.mark.parametrize("machine", ARCH)
def test_the_first_process_of_a_namespace_can_kill_itself(machine: str) -> None:
    program, arch, kill = build_filter(machine, first=True), ARCH[machine], (62, 129)[machine == "aarch64"]
    assert evaluate(program, kill, arch, 1, 9) == KILL
    assert {evaluate(program, kill, arch, *to) for to in ((2, 9), (1, 15), (0, 9), (0xFFFFFFFF, 9))} == {ALLOW}
    assert evaluate(build_filter(machine), kill, arch, 1, 9) == ALLOW
