"""Tensors of an adapter's file in a lower precision: as bfloat16 or float16, or as int8 with a scale for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INT8 = "int8"
SCALE = "_scale"  # ends the name of the scales of a tensor
_LARGEST = 127


def is_stored_as_int8(shape: Sequence[int | None]) -> bool:
    """Whether a tensor of this shape is quantized: those with rows are; vectors (norms, biases) cost little."""
    return len(shape) > 1


def cast_for_saving(tensors: dict[str, Tensor], save_dtype: str | None) -> dict[str, Tensor]:
    """Floating-point tensors in the dtype named ``save_dtype``; None keeps their own. Int8 ones come with scales.

    Raises:
        ValueError: a value would be lost: NaN and infinity in int8, numbers too large for a smaller dtype.
    """
    if save_dtype is None:
        return tensors
    if save_dtype == INT8:
        return quantize(tensors)
    dtype = getattr(torch, save_dtype)
    result = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.is_meta and (tensor.isfinite() & ~result[name].isfinite()).any():
            raise ValueError(
                f"The tensor {name!r} has values up to {tensor[tensor.isfinite()].abs().max():.3g}, but "
                f"save_dtype={save_dtype!r} holds up to {torch.finfo(dtype).max:.3g}; save it as float32 or bfloat16."
            )
    return result


def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Symmetric int8 per row (the last dimension): ``w = q * scale`` with ``scale = max |row| / 127``.

    A row is a key, a value, or the weights of one output of a linear layer.

    Args:
        tensors: floating point, by name; int8 ones are there already, with their scales, and stay.

    Returns:
        For a tensor (..., D): ``name`` int8 (..., D) and ``name_scale`` float32 (..., 1). Vectors as float32.

    Raises:
        ValueError: a row has values that are NaN or infinite.
    """
    result: dict[str, Tensor] = {}
    stored_scales = {name + SCALE for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or name in stored_scales:
            result[name] = tensor
        elif not is_stored_as_int8(tensor.shape):
            result[name] = tensor.float()
        else:
            rows = tensor.float()
            if not rows.is_meta and not rows.isfinite().all():
                raise ValueError(
                    f"The tensor {name!r} has values that are NaN or infinite, which save_dtype='int8' cannot hold; "
                    "train again, with a lower learning rate if they came from training, or save it as float32."
                )
            scale = rows.abs().amax(-1, keepdim=True) / _LARGEST
            scale = torch.where(scale > 0, scale, 1.0)
            result[name] = (rows / scale).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
            result[name + SCALE] = scale
    return result


def dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors from what :func:`quantize` made; others as they are.

    Raises:
        ValueError: scales are missing or do not fit.
    """
    quantized = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    scales = {name + SCALE for name in quantized}
    for name in sorted(quantized):
        scale, shape = tensors.get(name + SCALE), tensors[name].shape
        if scale is None or scale.shape != (*shape[:-1], 1):
            problem = "missing" if scale is None else f"of shape {list(scale.shape)}"
            raise ValueError(
                f"The saved tensor {name!r} is int8 of shape {list(shape)}, but its scales ({name + SCALE}) are "
                f"{problem} instead of {[*shape[:-1], 1]}; the file is damaged: save the adapter again."
            )
    return {
        name: tensor.float() * tensors[name + SCALE] if name in quantized else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }
