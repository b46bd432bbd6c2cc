"""Compiled kernels: built by the system's compiler at first use and kept in the user's cache folder.

They are built for the processor at hand. ``SPARSEPEFT_CPU`` names another, in the compiler's words for ``-march``:
``SPARSEPEFT_CPU=x86-64-v3`` gives what a machine with AVX2 and without AVX-512 would run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

_SHARED = Path(__file__).parent / "csrc"  # headers
_FLAGS = (*("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"), *("-fPIC", "-shared", "-Wno-psabi"))
# For this very CPU, tried in this order: not every compiler and CPU knows all of them. GCC prefers vectors of 256 bits
# on some CPUs that have 512.
_WIDE = "-mprefer-vector-width=512"
_TUNINGS = (("-march=native", _WIDE), ("-march=native",), ())


# Kinds of processors on which the kernels' tests have passed, with AVX-512, AVX2 and SSE. On others they have run
# emulated (Cortex-A72: ``make test-arm``), or not at all.
_PROVEN = ("x86_64", "AMD64")


def is_proven() -> bool:
    """Return whether the kernels have been run on a processor of this kind."""
    return platform.machine() in _PROVEN


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why."""


def has_plain_memory(*tensors: Tensor) -> bool:
    """Whether compiled code may read these tensors: plain ones in the CPU's memory.

    Subclasses (fake, distributed, quantized tensors) and those that a transform of ``torch.func`` wraps may have none.
    """
    return not torch._C._are_functorch_transforms_active() and all(
        tensor.is_cpu and type(tensor) in (Tensor, Parameter) for tensor in tensors
    )


def may_replace_call(*tensors: Tensor) -> bool:
    """Whether compiled code may compute a call of these tensors: plain ones, outside of what sees single operations.

    That is traced graphs and forward-mode differentiation, which ``torch.no_grad`` does not end.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch.autograd.forward_ad._current_level < 0
        and has_plain_memory(*tensors)
    )


def why_not_built(load: Callable[[], object]) -> str | None:
    """Why a library of kernels cannot be built or loaded; None after ``load`` has done it."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def load_library(sources: Path) -> ctypes.CDLL:
    """Return the kernels of a folder of sources, whose ``kernel.cpp`` is compiled, built if need be.

    Raises:
        BuildError: they cannot be built or loaded.
    """
    try:
        return ctypes.CDLL(str(build_library(sources)))
    except OSError as error:
        raise BuildError(f"they cannot be loaded: {error}.") from error


def openmp_parallel() -> int | None:
    """Return the address of ``GOMP_parallel``, with which kernels run on torch's own threads, or None.

    It is the one that libtorch_cpu itself is linked to, so a kernel joins the team of threads that torch's operators
    use, as many of them as ``torch.get_num_threads`` says, and starts none beside it. GNU's runtime has the function,
    and so have LLVM's and Intel's. Where torch has none of these, a kernel runs on the calling thread. So it does in a
    forked process whose parent ran kernels: there the team is gone, and whoever asks for it waits for ever, as torch's
    own operators do.
    """
    return None if _lost_threads else _find_openmp_parallel()


_lost_threads = False


def _after_fork() -> None:
    global _lost_threads
    _lost_threads = _find_openmp_parallel.cache_info().currsize > 0


@functools.cache
def _find_openmp_parallel() -> int | None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value  # looked up in what it depends on, too
    except (OSError, AttributeError):
        return None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def build_library(sources: Path) -> Path:
    """Return the path of the library for these sources, this compiler and this CPU, building it if it is missing.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found: neither $CXX nor c++, g++ or clang++.")
    target = cache_folder() / f"{sources.parent.name}-{_key(compiler, sources)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            _compile(compiler, sources, built)
            os.replace(built, target)  # at once: another process sees the whole library or none
    except OSError as error:
        raise BuildError(f"the cache folder {target.parent} cannot be written: {error}.") from error
    return target


def find_compiler() -> str | None:
    """Return the compiler to use: ``$CXX``, else the first of c++, g++, clang++ that exists."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def cache_folder() -> Path:
    """Return the user's folder for built libraries: ``$SPARSEPEFT_CACHE``, else under ``$XDG_CACHE_HOME``."""
    if os.environ.get("SPARSEPEFT_CACHE"):
        return Path(os.environ["SPARSEPEFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsepeft"


def _compile(compiler: str, sources: Path, target: Path) -> None:
    files = [f"-I{_SHARED}", str(sources / "kernel.cpp"), "-o", str(target)]
    tunings = _tunings()
    for tuning in tunings:
        result = subprocess.run([compiler, *_FLAGS, *tuning, *files], capture_output=True, text=True)
        if result.returncode == 0:
            return
    hint = (
        ""
        if tunings is _TUNINGS
        else f" SPARSEPEFT_CPU is {os.environ['SPARSEPEFT_CPU']!r}, which is handed to -march."
    )
    raise BuildError(f"{compiler} failed: {result.stderr.strip()[-500:]}.{hint}")


def _tunings() -> tuple[tuple[str, ...], ...]:
    """Return the flags to try; a processor that was asked for by name is not replaced by another."""
    name = os.environ.get("SPARSEPEFT_CPU")
    return ((f"-march={name}", _WIDE), (f"-march={name}",)) if name else _TUNINGS


def _key(compiler: str, sources: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*_SHARED.iterdir(), *sources.iterdir()]):
        digest.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest.update(repr((compiler, version, _FLAGS, sys.platform, machine())).encode())
    return digest.hexdigest()[:16]


@functools.cache
def machine() -> tuple[object, ...]:
    """Name the CPU, what it can do, and for which the kernels are built: a shared home folder may serve several."""
    return _cpu(), _tunings()


def _cpu() -> str:
    """Return the CPU's name and features, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = lines[: lines.index("")] if "" in lines else lines
    return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))
