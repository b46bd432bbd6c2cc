"""Which of several processes this is, where `accelerate launch` or `torchrun` started them to train together.

Nothing here needs PyTorch, so that the command line can ask before it is loaded.
"""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many processes train together, as their launcher says; 1 without one.

    A launcher sets LOCAL_RANK, too; schedulers and containers may set the others for what they start alone.
    """
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes files and says what is going on, or the only one."""
    return num_processes() == 1 or int(os.environ.get("RANK") or 0) == 0


def is_sharded() -> bool:
    """Whether each process is to hold a part of the weights (FSDP)."""
    return num_processes() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
