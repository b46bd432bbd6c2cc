"""What the processes of one training do in turn or together; each of these functions is for all of them to call."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from sparsepeft.errors import UserError
from sparsepeft.launch import is_first, num_processes

# The first process may compute the states of frozen layers, or save, for long while the others wait.
_TIMEOUT = timedelta(hours=6)

T = TypeVar("T")


def connect(device: torch.device) -> None:
    """Let the processes find each other, before anything is asked of them; a single one needs nothing.

    Args:
        device: where each trains; its index is the launcher's business.
    """
    if num_processes() > 1:
        backend = {"backend": "gloo"} if device.type == "cpu" else {}
        found = PartialState(cpu=device.type == "cpu", timeout=_TIMEOUT, **backend).num_processes
        if found != num_processes():
            raise UserError(
                f"The environment says that {num_processes()} processes train together (WORLD_SIZE), but {found} was "
                "found; start them by `torchrun` or `accelerate launch`."
            )


def leave() -> NoReturn:
    """End this process of several, successfully and at once.

    Python's own end may wait for ever: DDP's reducer is freed with the GIL held and joins gloo's thread, which needs
    the GIL to free its last work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait() -> None:
    """Go on when all processes have come here."""
    if num_processes() > 1:
        PartialState().wait_for_everyone()


@contextmanager
def first_before_others() -> Iterator[None]:
    """Let the first process do what is within before the others do."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; it has to be picklable, as a dictionary of numbers and names is."""
    if num_processes() == 1:
        return make()
    made: list[T | None] = [make() if is_first() else None]
    dist.broadcast_object_list(made, src=0, device=PartialState().device)
    return made[0]  # type: ignore[return-value]


def any_of_all(flag: bool) -> bool:
    """Whether ``flag`` is true in any of the processes."""
    if num_processes() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32, device=PartialState().device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)
