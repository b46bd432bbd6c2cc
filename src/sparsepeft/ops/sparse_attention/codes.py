"""Product quantization: a vector as the indices of its sub-vectors' nearest codewords."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepeft.ops.memory.select import softmax_dtype
from sparsepeft.ops.native import readable
from sparsepeft.ops.sparse_attention.choice import why_no_triton
from sparsepeft.ops.sparse_attention.compiled import encode_compiled
from sparsepeft.ops.sparse_attention.native import load_library

MAX_CODEWORDS = 16
# So many tokens at a time that a tile of distances has about this many entries.
_TILE_ENTRIES = 1 << 22


@torch.no_grad()
def encode(vectors: Tensor, codebooks: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the index of the nearest codeword of each sub-vector; of equally near ones the lowest.

    Distances are Euclidean, taken in float32 at least. Codes have no gradient.

    Args:
        vectors: queries or keys, (B, H, T, D).
        codebooks: (Hkv, M, C, W) with M * W = D and C <= 16; H is a multiple of Hkv, and neighbouring heads share.
        impl: ``"compiled"`` (CPU), ``"triton"`` (GPU), ``"torch"``, or ``"auto"``: one of the first two where it can
            be. They may differ where two codewords are equally near up to rounding.

    Returns:
        uint8, (B, H, T, M).

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, there are more than 16 codewords, or ``impl`` cannot take the tensor.
    """
    check_codebooks(codebooks, vectors.shape[-1] if vectors.ndim else 0)
    if vectors.ndim != 4 or vectors.shape[1] % codebooks.shape[0]:
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, codebooks {tuple(codebooks.shape)}; expected (B, H, T, D) and "
            "(Hkv, M, C, W) with H a multiple of Hkv."
        )
    if not vectors.is_floating_point():
        raise TypeError(f"vectors has dtype {vectors.dtype}; expected a floating-point tensor: convert it first.")
    if impl not in ("auto", "compiled", "triton", "torch"):
        raise ValueError(f"impl is {impl!r}; expected one of auto, compiled, triton, torch.")
    if impl == "triton" or (impl == "auto" and vectors.is_cuda):
        reason = why_no_triton(vectors)
        if reason is None:
            from sparsepeft.ops.sparse_attention.triton import encode_triton  # Triton is optional, and slow to import

            return encode_triton(vectors, codebooks)
        if impl == "triton":
            raise ValueError(f"impl is 'triton', but {reason}: use impl='auto'.")
    compilable = readable(vectors, codebooks) and vectors.dtype != torch.float64
    if impl == "compiled" and not compilable:
        raise ValueError(
            f"impl is 'compiled', but vectors is {vectors.dtype} on {vectors.device}, codebooks on {codebooks.device}; "
            "the kernel takes plain tensors on a CPU, float32 or narrower: use impl='auto'."
        )
    if impl == "compiled" or (impl == "auto" and compilable and load_library() is not None):
        return encode_compiled(vectors, codebooks)
    return _encode(vectors, codebooks)


def nearest_codewords(subvectors: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance to the nearest codeword and its index, for (..., H, N, M, W): (..., H, N, M) each."""
    half_norms = codebooks.square().sum(-1) / 2  # (H, M, C)
    products = torch.einsum("...hnmw,hmcw->...hnmc", subvectors, codebooks)
    closest = (half_norms.unsqueeze(-3) - products).min(-1)
    return 2 * closest.values + subvectors.square().sum(-1), closest.indices


def check_codebooks(codebooks: Tensor, head_size: int) -> None:
    """Raise unless the codebooks suit vectors of this size."""
    if not codebooks.is_floating_point():
        raise TypeError(f"codebooks has dtype {codebooks.dtype}; expected a floating-point tensor.")
    if codebooks.ndim != 4 or 0 in codebooks.shape:
        raise ValueError(
            f"codebooks has shape {tuple(codebooks.shape)}; expected (Hkv, M, C, W): M sub-vectors of width W with C "
            "codewords for each key-value head; fit_codebooks makes them."
        )
    _, num_subvectors, num_codewords, width = codebooks.shape
    if num_codewords > MAX_CODEWORDS:
        raise ValueError(f"codebooks has {num_codewords} codewords; expected at most {MAX_CODEWORDS}.")
    if num_subvectors * width != head_size:
        raise ValueError(
            f"codebooks has {num_subvectors} sub-vectors of width {width}, {num_subvectors * width} numbers, but the "
            f"vectors have {head_size}: choose a width that divides the head size."
        )


def _encode(vectors: Tensor, codebooks: Tensor) -> Tensor:
    precise = softmax_dtype(vectors.dtype)
    batch, heads, num_tokens, _ = vectors.shape
    kv_heads, num_subvectors, num_codewords, width = codebooks.shape
    codebooks = codebooks.to(precise).repeat_interleave(heads // kv_heads, dim=0)
    codes = torch.empty(batch, heads, num_tokens, num_subvectors, dtype=torch.uint8, device=vectors.device)
    step = max(1, _TILE_ENTRIES // max(1, batch * heads * num_subvectors * num_codewords))
    for begin in range(0, num_tokens, step):
        part = vectors[:, :, begin : begin + step].to(precise).unflatten(-1, (num_subvectors, width))
        codes[:, :, begin : begin + step] = nearest_codewords(part, codebooks)[1]
    return codes
