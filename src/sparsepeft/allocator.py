"""What the C library does with the memory of tensors that are no longer needed."""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors instead of returning it to the system.

    glibc asks the system for every block of more than 32 MB and returns it when it is freed, and so for what a training
    step frees at its end. Each layer of each pass then waits for pages that the system must clear first, between none
    and half of the time (``benchmarks/bench_allocator.py``). Afterwards the process stays as large as it has been at
    its largest, which may be more than before. All threads share one arena then, as only the main one has no limit.

    The command line calls this where it trains or predicts; a library must leave it to the program.

    Returns:
        Whether it was done. It is not where the C library is another one, or where the environment already sets glibc's
        allocator up (``GLIBC_TUNABLES``, ``MALLOC_*``). Another allocator that was preloaded is not touched.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    answers = [mallopt(parameter, value) for parameter, value in settings]
    return all(answer == 1 for answer in answers)
