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


# What is done in turn, and for each measurement the pages that the system had to give while the same large tensor is
# made and freed, after the first times.
_FAULTS = """
import resource
import sys
import threading
import peft  # with less than the command line has imported, the place of a freed block is a matter of chance
import torch
from sparsepeft.devices import keep_freed_memory
def use():
    for number in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20).sum()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
def use_in_a_thread():
    thread = threading.Thread(target=use); thread.start(); thread.join()
def keep():
    print(keep_freed_memory())
for step in sys.argv[1:]: globals()[step]()
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

_FEW = 16  # the tensor has 16,384 pages of 4 kB, or 32 of 2 MB


def outcomes(*steps: str, **environment: str) -> list[str]:
    """What each step printed: many or few for a number of pages."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", _FAULTS, *steps]
    ended = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return [("many" if int(word) > _FEW else "few") if word.isdigit() else word for word in ended.stdout.split()]


@on_glibc
def test_a_freed_tensors_memory_is_reused() -> None:
    assert outcomes("use", "use_in_a_thread", "keep", "use") == ["many", "many", "True", "few"]
    assert outcomes("keep", "use_in_a_thread") == ["True", "few"]


@on_glibc
def test_an_allocator_that_the_user_has_set_up_stays_so() -> None:
    assert outcomes("keep", "use", MALLOC_ARENA_MAX="2") == ["False", "many"]
