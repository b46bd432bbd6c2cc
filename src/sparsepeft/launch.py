"""Which of several processes this is, where `accelerate launch` or `torchrun` started them to train together.

Nothing here needs PyTorch, so that the command line can ask before it is loaded.
"""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many processes train together, as their launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes files and says what is going on, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0
