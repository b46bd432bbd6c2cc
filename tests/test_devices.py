"""Devices by name, and memory of freed tensors, which is reused where the C library can be told to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

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


# Pages that the system had to give while the same large tensor is made and freed, after the first times.
_FAULTS = """
import resource
import threading
import peft  # with less than the command line has imported, the place of a freed block is a matter of chance
import torch
from sparsepeft.devices import keep_freed_memory
{first}
def use():
    global faults
    for number in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20).sum()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
{then}
print(faults)
"""
_IN_A_THREAD = "thread = threading.Thread(target=use); thread.start(); thread.join()"
_FEW = 16  # the tensor has 16,384 pages of 4 kB, or 32 of 2 MB


def faults(first: str, then: str = "use()", **environment: str) -> int:
    code = _FAULTS.format(first=first, then=then)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_reused_unless_the_user_has_set_the_allocator_up() -> None:
    assert faults("") > _FEW
    assert faults("assert keep_freed_memory()") < _FEW
    assert faults("assert keep_freed_memory()", _IN_A_THREAD) < _FEW
    assert faults("assert not keep_freed_memory()", MALLOC_ARENA_MAX="2") > _FEW
