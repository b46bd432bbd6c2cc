"""Where to compute, by name."""

from __future__ import annotations

import torch

from sparsepeft.errors import UserError


def find_device(name: str | None = None) -> torch.device:
    """The device of a name such as ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; None is the accelerator, or else the CPU.

    Raises:
        UserError: PyTorch knows no such device, or this machine has none.
    """
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
