"""Product quantization: a vector as the indices of its sub-vectors' nearest codewords, which k-means finds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops import gpu
from sparsepeft.ops.native import has_plain_memory
from sparsepeft.ops.numerics import softmax_dtype
from sparsepeft.ops.registry import Implementation, Operator
from sparsepeft.ops.sparse_attention.arguments import (
    MAX_CODEWORDS,
    Settings,
    Visibility,
    check_channel_weights,
    check_codebooks,
)
from sparsepeft.ops.sparse_attention.choice import why_slower_here
from sparsepeft.ops.sparse_attention.cpu import encode_cpu, why_not_built
from sparsepeft.ops.sparse_attention.selection import Selection, keep_blocks, match_scores, pooled_scores
from sparsepeft.ops.sparse_attention.similarity import Codes, weighted_words

# So many tokens at a time that a tile of distances has about this many entries.
_TILE_ENTRIES = 1 << 22


class EncodeArguments(NamedTuple):
    """What the choice depends on; see :func:`encode`."""

    vectors: Tensor
    codebooks: Tensor

    @classmethod
    def bind(cls, vectors: Tensor, codebooks: Tensor, **_: Any) -> EncodeArguments:
        """Take the arguments of :func:`encode`."""
        return cls(vectors, codebooks)


def _why_not_cpu(arguments: EncodeArguments) -> str | None:
    if not has_plain_memory(*arguments):
        return f"vectors is on {arguments.vectors.device}; the compiled kernel takes plain tensors on a CPU"
    if arguments.vectors.dtype == torch.float64:
        return "vectors is torch.float64; the compiled kernel takes float32, bfloat16 and float16"
    return None


OPERATOR = Operator(
    "encode",
    EncodeArguments.bind,
    [
        Implementation("torch", 10, "runs everywhere"),
        Implementation(
            "cpu",
            20,
            "compiled, it needs no tensor of all distances",
            why_unavailable=why_not_built,
            why_not=_why_not_cpu,
            why_not_automatic=lambda _: why_slower_here(),
        ),
        Implementation(
            "triton",
            30,
            "one kernel, which stores codes alone",
            why_unavailable=gpu.why_no_triton,
            why_not=lambda arguments: gpu.why_not_triton(arguments.vectors),
            why_not_automatic=lambda arguments: gpu.why_not_triton_by_itself(arguments.vectors),
        ),
    ],
)


@torch.no_grad()
def encode(vectors: Tensor, codebooks: Tensor, *, channel_weights: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Return the index of the nearest codeword of each sub-vector; of equally near ones the lowest.

    Distances are Euclidean, of channels times their weights, taken in float32 at least. Codes have no gradient.

    Args:
        vectors: queries or keys, (B, H, T, D).
        codebooks: (Hkv, M, C, W) with M * W = D and C <= 16; H is a multiple of Hkv, and neighbouring heads share.
        channel_weights: (Hkv, D), positive; None weighs all channels alike.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"torch"``; see :func:`sparsepeft.ops.explain`. They may differ
            where two codewords are equally near up to rounding.

    Returns:
        uint8, (B, H, T, M).

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, there are more than 16 codewords, or ``impl`` cannot take the tensor.
        RuntimeError: this machine does not have ``impl``.
    """
    check_codebooks(codebooks, vectors.shape[-1] if vectors.ndim else 0)
    if vectors.ndim != 4 or vectors.shape[1] % codebooks.shape[0]:
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, codebooks {tuple(codebooks.shape)}; expected (B, H, T, D) and "
            "(Hkv, M, C, W) with H a multiple of Hkv."
        )
    if not vectors.is_floating_point():
        raise TypeError(f"vectors has dtype {vectors.dtype}; expected a floating-point tensor: convert it first.")
    check_channel_weights(channel_weights, codebooks)
    impl = OPERATOR.choose(impl, EncodeArguments(vectors, codebooks))
    if impl == "triton":
        from sparsepeft.ops.sparse_attention.triton import encode_triton  # Triton is optional, and slow to import

        return encode_triton(vectors, codebooks, channel_weights)
    form = encode_cpu if impl == "cpu" else _encode
    return form(vectors, codebooks, channel_weights)


def _nearest(subvectors: Tensor, words: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return half the squared distance to the nearest codeword, less a constant, and its index: (..., H, N, M) each.

    ``subvectors`` is (..., H, N, M, W), the others are of :func:`weighted_words`.
    """
    products = torch.einsum("...hnmw,hmcw->...hnmc", subvectors, words)
    closest = (half_norms.unsqueeze(-3) - products).min(-1)
    return closest.values, closest.indices


def _encode(vectors: Tensor, codebooks: Tensor, channel_weights: Tensor | None) -> Tensor:
    precise = softmax_dtype(vectors.dtype)
    batch, heads, num_tokens, _ = vectors.shape
    kv_heads, num_subvectors, num_codewords, width = codebooks.shape
    weighted = weighted_words(codebooks.to(precise), channel_weights)
    words, half_norms = (tensor.repeat_interleave(heads // kv_heads, 0) for tensor in weighted)
    codes = torch.empty(batch, heads, num_tokens, num_subvectors, dtype=torch.uint8, device=vectors.device)
    step = max(1, _TILE_ENTRIES // max(1, batch * heads * num_subvectors * num_codewords))
    for begin in range(0, num_tokens, step):
        part = vectors[:, :, begin : begin + step].to(precise).unflatten(-1, (num_subvectors, width))
        codes[:, :, begin : begin + step] = _nearest(part, words, half_norms)[1]
    return codes


@torch.no_grad()
def select(
    query: Tensor,
    key: Tensor,
    codebooks: Tensor | None,
    channel_weights: Tensor | None,
    visibility: Visibility,
    settings: Settings,
) -> Selection:
    """Return by what each query selects its keys, or the lists of blocks that were selected."""
    num_keys = key.shape[2]
    if settings.block_size and settings.inner_product:
        return keep_blocks(pooled_scores(query, key, visibility, settings), num_keys, visibility, settings)
    assert codebooks is not None
    keys = encode(key, codebooks, channel_weights=channel_weights)
    if settings.inner_product:
        return Codes(keys, None, codebooks)
    queries = encode(query, codebooks)
    if settings.block_size:
        return keep_blocks(match_scores(queries, keys, visibility, settings), num_keys, visibility, settings)
    return Codes(keys, queries, codebooks)


# Codebooks, by k-means on calibration vectors


@torch.no_grad()
def fit_codebooks(
    vectors: Tensor,
    *,
    subvector_dim: int = 8,
    num_codewords: int = MAX_CODEWORDS,
    channel_weights: Tensor | None = None,
    num_iterations: int = 20,
    seed: int = 0,
) -> Tensor:
    """Return codebooks fitted to vectors by k-means, for each head and each of its sub-vectors alone.

    The first codewords are spread over the data (k-means++: each is a vector drawn with a probability proportional to
    the squared distance from those already drawn), so that all are in use. A codeword that loses its last vector is put
    on the vector that is farthest from its own codeword.

    Args:
        vectors: keys, and queries of the heads that share them, (H, N, D).
        subvector_dim: numbers per sub-vector, W; divides D.
        num_codewords: C, 1 to 16; N >= C.
        channel_weights: (H, D), positive: how much the error of each channel counts; all alike if None. For inner
            products with queries these are the roots of the queries' second moments.
        num_iterations: Lloyd steps at most; it stops earlier when nothing changes.
        seed: of the random choice of the first codewords; torch's own random state is not touched.

    Returns:
        (H, M, C, W) with M = D / W, float32 (float64 for float64 vectors).

    Raises:
        TypeError: ``vectors`` is not floating point.
        ValueError: shapes or numbers are out of range, there are too few vectors, or some are not finite.
    """
    if vectors.ndim != 3:
        raise ValueError(f"vectors has shape {tuple(vectors.shape)}; expected (H, N, D).")
    if subvector_dim < 1 or vectors.shape[-1] % subvector_dim:
        raise ValueError(
            f"subvector_dim is {subvector_dim}, the head size {vectors.shape[-1]}: choose a width that divides it."
        )
    if not 1 <= num_codewords <= MAX_CODEWORDS:
        raise ValueError(f"num_codewords is {num_codewords}; expected 1 to {MAX_CODEWORDS}.")
    vectors = _checked(vectors, num_codewords)
    scales = _scales(channel_weights, vectors, subvector_dim)
    subvectors = vectors.unflatten(-1, (-1, subvector_dim)) * scales.unsqueeze(1)  # (H, N, M, W)
    generator = torch.Generator().manual_seed(seed)
    seeds = [_spread(head, num_codewords, generator) for head in subvectors.split(1)]
    fitted = torch.cat([_lloyd(*pair, num_iterations) for pair in zip(seeds, subvectors.split(1), strict=True)])
    return fitted / scales.unsqueeze(2)


@torch.no_grad()
def refresh_codebooks(
    codebooks: Tensor, vectors: Tensor, *, channel_weights: Tensor | None = None, num_iterations: int = 2
) -> Tensor:
    """Return new codebooks, a few k-means steps from the present ones towards the vectors; these stay as they are.

    With fewer vectors than codewords, a codeword that is nearest to none of them stays where it is.

    Args:
        codebooks: (H, M, C, W).
        vectors: (H, N, M * W), N >= 1.
        channel_weights: (H, M * W); see :func:`fit_codebooks`.
        num_iterations: Lloyd steps.

    Returns:
        (H, M, C, W), dtype of ``codebooks``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, there are no vectors, or some are not finite.
    """
    check_codebooks(codebooks, vectors.shape[-1] if vectors.ndim else 0)
    if vectors.ndim != 3 or vectors.shape[0] != codebooks.shape[0]:
        raise ValueError(
            f"vectors has shape {tuple(vectors.shape)}, codebooks {tuple(codebooks.shape)}; expected (H, N, D) with "
            "the same H."
        )
    vectors = _checked(vectors, 1)
    scales = _scales(channel_weights, vectors, codebooks.shape[-1])
    subvectors = vectors.unflatten(-1, (codebooks.shape[1], -1)) * scales.unsqueeze(1)
    heads = zip((codebooks * scales.unsqueeze(2)).to(vectors.dtype).split(1), subvectors.split(1), strict=True)
    refreshed = torch.cat([_lloyd(book, head, num_iterations) for book, head in heads])
    return (refreshed / scales.unsqueeze(2)).to(codebooks.dtype)


def _scales(channel_weights: Tensor | None, vectors: Tensor, width: int) -> Tensor:
    """Return the weights of each sub-vector's channels, (H, M, W); of a channel of weight 0 nothing would be known."""
    if channel_weights is None:
        return vectors.new_ones(vectors.shape[0], vectors.shape[-1] // width, width)
    if channel_weights.shape != (vectors.shape[0], vectors.shape[-1]) or not (channel_weights > 0).all():
        raise ValueError(
            f"channel_weights has shape {tuple(channel_weights.shape)}; expected (H, D), "
            f"({vectors.shape[0]}, {vectors.shape[-1]}), and positive numbers."
        )
    return channel_weights.to(vectors.dtype).unflatten(-1, (-1, width))


def _checked(vectors: Tensor, num_needed: int) -> Tensor:
    if not vectors.is_floating_point():
        raise TypeError(f"vectors has dtype {vectors.dtype}; expected a floating-point tensor: convert it first.")
    if vectors.shape[1] < num_needed:
        raise ValueError(
            f"there are {vectors.shape[1]} vectors per head for {num_needed} codewords: give at least as many, "
            "better some thousands."
        )
    if not torch.isfinite(vectors).all():
        raise ValueError("vectors contains NaN or infinity: look for it in the calibration data or in the model.")
    return vectors.to(softmax_dtype(vectors.dtype))


def _spread(subvectors: Tensor, num_codewords: int, generator: torch.Generator) -> Tensor:
    """Draw the first codewords of one head by k-means++; (1, N, M, W) to (1, M, C, W)."""
    groups = subvectors[0].transpose(0, 1)  # (M, N, W)
    num_groups, num_vectors, _ = groups.shape
    weights = torch.ones(num_groups, num_vectors, dtype=groups.dtype, device=groups.device)
    drawn: list[Tensor] = []
    for _ in range(num_codewords):
        # Where all distances are zero, any vector will do.
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1)
        ends = weights.cumsum(-1)
        places = torch.rand(num_groups, 1, generator=generator).to(ends) * ends[:, -1:]
        index = torch.searchsorted(ends, places, right=True).clamp_max(num_vectors - 1)
        chosen = groups.gather(1, index.unsqueeze(-1).expand(-1, -1, groups.shape[-1]))  # (M, 1, W)
        distance = (groups - chosen).square().sum(-1)
        weights = torch.minimum(weights, distance) if drawn else distance
        drawn.append(chosen)
    return torch.cat(drawn, dim=1).unsqueeze(0)


def _lloyd(codebooks: Tensor, subvectors: Tensor, num_iterations: int) -> Tensor:
    """Take k-means steps for one head: (1, M, C, W) and (1, N, M, W) to (1, M, C, W)."""
    _, num_subvectors, num_codewords, width = codebooks.shape
    groups = subvectors[0].transpose(0, 1)  # (M, N, W)
    for _ in range(num_iterations):
        half_distance, nearest = _nearest(subvectors, *weighted_words(codebooks, None))
        distance, nearest = 2 * half_distance[0].T + groups.square().sum(-1), nearest[0].T  # (M, N)
        counts = groups.new_zeros(num_subvectors, num_codewords).scatter_add_(1, nearest, torch.ones_like(distance))
        sums = groups.new_zeros(num_subvectors, num_codewords, width)
        sums.scatter_add_(1, nearest.unsqueeze(-1).expand_as(groups), groups)
        means = sums / counts.clamp_min(1).unsqueeze(-1)
        empty = counts == 0
        if groups.shape[1] < num_codewords:
            replacement = codebooks[0]
        else:  # the first empty codeword takes the farthest vector, the second the second farthest, ...
            farthest = distance.topk(num_codewords, dim=1).indices.gather(1, (empty.cumsum(1) - 1).clamp_min(0))
            replacement = groups.gather(1, farthest.unsqueeze(-1).expand(-1, -1, width))
        moved = torch.where(empty.unsqueeze(-1), replacement, means).unsqueeze(0)
        if torch.equal(moved, codebooks):
            break
        codebooks = moved
    return codebooks
