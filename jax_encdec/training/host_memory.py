"""Freed memory kept for the next step, where a step runs on the processor itself.

A compiled step asks the C library for its temporaries anew each time. By default glibc takes so
large a piece from the kernel and gives it back at the end, and every page of it is cleared and
mapped again at each step: measured as a quarter of a step's time.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what this process frees, for good; True if it will.

    To be called before JAX starts its threads: what they allocate must come from the one heap
    that can grow without limit. The process then never shrinks, and peaks somewhat higher. Where
    the C library is another, or the environment configures it (`GLIBC_TUNABLES`, `MALLOC_...`),
    nothing is changed.
    """
    own = "GLIBC_TUNABLES" in os.environ or any(n.startswith("MALLOC_") for n in os.environ)
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it
    except (OSError, AttributeError):
        return False
    settings = (_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)
    return all(library.mallopt(name, value) == 1 for name, value in settings)
