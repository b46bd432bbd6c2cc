"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from sparsepeft.devices import find_device
from sparsepeft.errors import UserError


def test_no_name_is_the_accelerator_or_the_cpu() -> None:
    assert find_device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu:77", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"`device=.*` was given, but PyTorch finds only"):
        find_device(name)
