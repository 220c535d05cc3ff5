"""The namespaces and the private root directory in which a zygote lives, and the small ones of each case.

The root holds the standard library read-only and nothing else of the host: no binaries, no shared libraries (those the
interpreter needs are already loaded), no ``/proc``, no ``/sys``, no ``/etc``. The one writable place is a fresh tmpfs
per case, at ``/box/case``, that ``/work``, ``/tmp`` and ``/dev/shm`` point into.

Runs in the zygote, so it imports only the standard library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from agentopd_sandboxes import linux

NOBODY = 65534
"""The uid and gid inside the sandbox; outside too when the judge runs as root."""
BOX = "/box"
PACKAGES = "/packages"
CASE_DIR = "/box/case"
WORK, TMP = "/work", "/tmp"
INODES = 4096
DISK_FILES = 4
"""The tmpfs of a case holds this many files of the largest permitted size."""

ZYGOTE_FLAGS = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
CELL_FLAGS = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC
"""The empty network namespace is the zygote's: nothing in it outlives the processes of a cell."""

_OLD = "/old"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ZONES = "/usr/share/zoneinfo"
_FOREIGN = ("site-packages", "dist-packages")


# --- identities ------------------------------------------------------------------------------------------------------


def enter_zygote_namespaces(proc: int) -> bool:
    """Leave every namespace of the host; ``proc`` is a descriptor of the host's ``/proc``.

    As root two uids are mapped, so that the root can be assembled from directories only root may enter before the
    zygote becomes nobody; only a process outside can write such a map, hence the helper. Returns whether that worked.
    """
    helper = _start_map_helper() if os.geteuid() == 0 else None
    uid, gid = os.geteuid(), os.getegid()
    linux.unshare(ZYGOTE_FLAGS)
    if helper is not None and _helper_wrote_maps(*helper):
        return True
    write_maps(proc, uid, gid)
    return False


def write_maps(proc: int, outer_uid: int, outer_gid: int) -> None:
    """Map nobody, inside the caller's new user namespace, to one identity outside it."""
    _write_at(proc, "self/setgroups", "deny")
    _write_at(proc, "self/uid_map", f"{NOBODY} {outer_uid} 1")
    _write_at(proc, "self/gid_map", f"{NOBODY} {outer_gid} 1")


def _write_at(directory: int, path: str, text: str) -> None:
    where = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(where, text.encode())
    finally:
        os.close(where)


def _start_map_helper() -> tuple[int, int]:
    """Fork a process that stays outside and maps root and nobody once told to; returns its pid and the pipe."""
    ready, go = os.pipe()
    target = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        status = 1
        try:
            if os.read(ready, 1):
                for kind in ("uid_map", "gid_map"):
                    with open(f"/proc/{target}/{kind}", "w") as file:
                        file.write(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                status = 0
        except OSError:
            pass
        finally:
            os._exit(status)
    os.close(ready)
    return pid, go


def _helper_wrote_maps(pid: int, go: int) -> bool:
    os.write(go, b"g")
    os.close(go)
    return os.waitpid(pid, 0)[1] == 0


def become_nobody(two_uids: bool) -> None:
    """Give up the identity and every capability needed to build the root."""
    if two_uids:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        linux.make_dumpable()
    linux.drop_capabilities()


# --- the root --------------------------------------------------------------------------------------------------------


def build_root(libraries: Mapping[str, str]) -> None:
    """Replace the caller's root by a private read-only one.

    ``libraries``: where on the host the importable packages and modules are that ``/packages`` shall hold.
    """
    sources = [(path, os.path.realpath(path)) for path in _library_directories()]
    extras = [(f"{PACKAGES}/{os.path.basename(path)}", os.path.realpath(path)) for path in libraries.values()]
    linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,nr_inodes=512,mode=755")
    os.mkdir("/tmp" + _OLD)
    linux.pivot_root("/tmp", "/tmp" + _OLD)
    os.chdir("/")
    for path, real in sources:
        _bind_directory(real, path)
    for path, real in extras:
        if os.path.isdir(_OLD + real):
            _bind_directory(real, path)
        else:
            _bind_file(real, path)
    os.mkdir("/dev", 0o755)
    for name in _DEVICES:
        _bind_device(f"/dev/{name}")
    os.makedirs(CASE_DIR)
    for link, name in ((WORK, "work"), (TMP, "tmp"), ("/dev/shm", "shm")):
        os.symlink(f"{CASE_DIR}/{name}", link)
    linux.umount(_OLD, linux.MNT_DETACH)
    os.rmdir(_OLD)
    linux.restrict_mount("/", linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV)


def _library_directories() -> list[str]:
    """The standard library's directories as ``sys.path`` spells them, outermost only, and the time zones."""
    found: list[str] = []
    for path in sorted({*sys.path, _ZONES}):
        if os.path.isdir(path) and not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


def _bind_directory(real: str, path: str) -> None:
    os.makedirs(path, exist_ok=True)
    linux.mount(_OLD + real, path, "", linux.MS_BIND | linux.MS_REC)
    for foreign in _FOREIGN:
        hidden = f"{path}/{foreign}"
        if os.path.isdir(hidden):
            linux.mount("tmpfs", hidden, "tmpfs", 0, "size=4k,nr_inodes=1,mode=755")
    linux.restrict_mount(path, linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV, recursive=True)


def _bind_file(real: str, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(_OLD + real, path, "", linux.MS_BIND)
    linux.restrict_mount(path, linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NODEV)


def _bind_device(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(_OLD + path, path, "", linux.MS_BIND)
    linux.restrict_mount(path, linux.ATTR_RDONLY | linux.ATTR_NOSUID | linux.ATTR_NOEXEC)


def mount_case_directory(file_mb: int) -> None:
    """Mount the one writable place of a cell; the caller is in the cell's own mount namespace."""
    options = f"size={DISK_FILES * file_mb}m,nr_inodes={INODES},mode=700"
    linux.mount("tmpfs", CASE_DIR, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, options)
    for name in ("work", "tmp", "shm"):
        os.mkdir(f"{CASE_DIR}/{name}", 0o700)
