"""Triton kernels without a GPU: run by Triton's interpreter, or assembled for a GPU that is not there.

Triton decides at its import, for the whole process, whether kernels are interpreted. So both happen in processes of
their own, one for each, started at first use and kept; a test passes them a function, by reference, and arguments that
can be pickled. Nothing here imports Triton in the process of the tests.

    def check_double(size: int, device: str = "cpu") -> None: ...   # at module level; impl="triton" against another

    interpreted(check_double, size)                                 # a failure is raised here, with its traceback
    assert_assembles(launch_double, 1000, capability=90)            # launches on any tensors of the right shapes

The same ``check_double`` is what a test marked ``gpu`` calls, with ``device="cuda"`` and in the test's own process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Compute capabilities (A100, H100) and the shared memory that one of their thread blocks may have.
SHARED_BYTES_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
CAPABILITIES = tuple(SHARED_BYTES_LIMIT)


class AssembledKernel(NamedTuple):
    """What the assembler said of one launch; sizes in bytes, of one thread for registers and spills."""

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int


def interpreted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``function(*args, **kwargs)``, called where Triton interprets kernels and CPU tensors are welcome.

    The random seed is 0, and memory from ``torch.empty`` is filled with NaN: a kernel that skips an element shows.
    """
    return _interpreter().submit(_seeded, function, args, kwargs).result()


def assembled(function: Callable[..., Any], *args: Any, capability: int, **kwargs: Any) -> list[AssembledKernel]:
    """Call ``function(*args, **kwargs)`` with every Triton launch in it assembled for ``capability`` and not run.

    What is assembled is what a launch would be: the same constants, number of warps and stages, alignment of pointers
    and sizes. Outputs stay uninitialised, so the function must not look at them; tensors are CPU tensors. Kernels
    under ``triton.autotune`` cannot be assembled this way: there is nothing to time them on.
    """
    return _assembler().submit(_assemble, function, args, kwargs, capability).result()


def assert_assembles(function: Callable[..., Any], *args: Any, capability: int, **kwargs: Any) -> list[AssembledKernel]:
    """Assert that the launches of :func:`assembled` spill no register and fit into shared memory, and return them."""
    kernels = assembled(function, *args, capability=capability, **kwargs)
    assert kernels, f"{function.__name__} launched no Triton kernel"
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0, f"registers spill: {kernel}"
        assert kernel.shared_bytes <= SHARED_BYTES_LIMIT[capability], f"too much shared memory: {kernel}"
    return kernels


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    return _start({"TRITON_INTERPRET": "1"}, _become_interpreter)


@functools.cache
def _assembler() -> ProcessPoolExecutor:
    # No log comes with a kernel from Triton's cache.
    return _start({"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}, None)


def _start(environment: dict[str, str], initializer: Callable[[], None] | None) -> ProcessPoolExecutor:
    """Start a process that has these variables before its first import."""
    with mock.patch.dict(os.environ, environment):
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=initializer)
        pool.submit(int).result()
    return pool


def _become_interpreter() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch.empty fill
    _mend_bfloat16()


def _mend_bfloat16() -> None:
    """Let the interpreter multiply and round bfloat16 as a GPU does.

    It keeps the 16 bits as integers, which tl.dot multiplies as such, and cuts float32 off instead of rounding to the
    nearest, ties to even (Triton 3.7 and 3.9).
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widen(a), widen(b), *args)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = np.asarray(source.data, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _seeded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return function(*args, **kwargs)


def _assemble(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], capability: int
) -> list[AssembledKernel]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Absent:
        """As much of a driver as a launch needs before it meets the device."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    kernels = []

    def assemble_only(self: Any, *launch_args: Any, grid: Any, warmup: bool, **launch_kwargs: Any) -> Any:
        self.device_caches.clear()  # they would keep the last capability's
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = launch(self, *launch_args, grid=grid, warmup=True, **launch_kwargs)
        kernels.append(_read_log(log.getvalue(), kernel.metadata.name, kernel.metadata.shared))
        return kernel

    launch = JITFunction.run
    triton.runtime.driver.set_active(Absent())
    JITFunction.run = assemble_only
    try:
        _seeded(function, args, kwargs)
    finally:
        JITFunction.run = launch
    return kernels


def _read_log(log: str, name: str, shared_bytes: int) -> AssembledKernel:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"the assembler's log of {name} names no registers or spills: {log!r}")
    return AssembledKernel(name, int(registers[1]), int(spills[1]), int(spills[2]), shared_bytes)
