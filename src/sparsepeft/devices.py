"""Where to compute, and what becomes of the memory that is freed there."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import TYPE_CHECKING

from sparsepeft.errors import UserError

if TYPE_CHECKING:
    import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def find_device(name: str | None = None) -> torch.device:
    """The device of a name such as ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; None is the accelerator, or else the CPU.

    Raises:
        UserError: PyTorch knows no such device, or this machine has none.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    known = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.accelerator.device_count() if accelerator else 0
    if device is None or device.type not in known or (device.type != "cpu" and (device.index or 0) >= count):
        raise UserError(
            f"`device={name}` was given, but PyTorch finds only {' and '.join(known)} here; pass one of these."
        )
    return device


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors instead of returning it to the system.

    glibc asks the system for every block of more than 32 MB and returns it when it is freed, and so for what a training
    step frees at its end. Each layer of each pass then waits for pages that the system must clear first, between none
    and half of the time (``sparsepeft benchmark allocator``). Afterwards the process stays as large as it has been at
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
