"""Memory of freed tensors is reused, where the C library lets us say so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def faults(first: str, then: str = "use()", **environment: str) -> int:
    code = _FAULTS.format(first=first, then=then)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("then", ["use()", _IN_A_THREAD])
def test_a_freed_tensors_memory_is_reused(then: str) -> None:
    assert faults("", then) > _FEW
    assert faults("assert keep_freed_memory()", then) < _FEW


def test_an_allocator_that_the_user_has_set_up_stays_so() -> None:
    assert faults("assert not keep_freed_memory()", MALLOC_ARENA_MAX="2") > _FEW
