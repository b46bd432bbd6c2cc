"""Where Triton kernels can run, and where they have been run."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from sparsepeft.ops import registry

HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, slowly
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Compute capability of the NVIDIA GPU on which tests/ops/gpu was run, an H200; an H100 has the same.
_PROVEN_CAPABILITIES = ((9, 0),)


def why_no_triton() -> str | None:
    """Return why Triton cannot be used on this machine, or None."""
    return None if HAS_TRITON else "the package triton is not installed: pip install triton"


def why_not_triton(*tensors: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Return why Triton kernels cannot take these tensors (in their own dtype or as ``dtype``), or None."""
    for tensor in tensors:
        if not (tensor.is_cuda or _INTERPRETED):
            return (
                "the tensors are on no CUDA device, where Triton kernels run"  # no name: a read of one token feels it
            )
        if (dtype or tensor.dtype) not in DTYPES:
            return f"the tensors are {dtype or tensor.dtype}, the Triton kernels take float32, bfloat16 and float16"
    return None


def why_not_triton_by_itself(tensor: Tensor, *, has_run: bool = True) -> str | None:
    """Return why "auto" takes no Triton kernel for tensors on this device, or None.

    ``has_run`` says whether the kernels, as they are, were run on any GPU.
    """
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device}, where Triton kernels are interpreted"
    if "triton" in registry.ENABLED:
        return None
    return _why_unproven() if has_run else "these Triton kernels have been compiled for GPUs, but not run on one yet"


@torch.compiler.assume_constant_result
def _why_unproven() -> str | None:
    return _ask_current_gpu() if torch.cuda.is_initialized() else None  # else a tensor without memory: nothing will run


@functools.cache  # asking takes as long as a small kernel
def _ask_current_gpu() -> str | None:
    """Return why kernels are not taken by themselves on the current GPU, with a warning; None where they are proven."""
    if torch.version.hip is None and torch.cuda.get_device_capability() in _PROVEN_CAPABILITIES:
        return None
    reason = f"the Triton kernels have not been run on a GPU like {torch.cuda.get_device_name()} yet"
    warnings.warn(
        f"{reason}, so PyTorch's own are used. To have them, set SPARSEPEFT_ENABLE=triton or give impl='triton'; "
        "pytest -m gpu tests/ops/gpu shows whether they are right here.",
        stacklevel=2,
    )
    return reason
