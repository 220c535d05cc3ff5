"""How this process gives memory back, where the C library lets us say."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_LARGE = 32 * 2**20  # the most glibc takes


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what tensors free, instead of returning it to the kernel; says whether it will.

    A step on a CPU allocates and frees the same large tensors again and again. By default each goes back to the kernel
    and is mapped, faulted in and zeroed anew.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20))
    return all(mallopt(name, value) == 1 for name, value in wanted)
