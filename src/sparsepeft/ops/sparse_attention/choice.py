"""Which implementation of sparse attention runs, and which can take what."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops import gpu, native
from sparsepeft.ops.measured import fastest
from sparsepeft.ops.registry import Implementation, Operator
from sparsepeft.ops.sparse_attention.arguments import Settings, Visibility
from sparsepeft.ops.sparse_attention.cpu import cpu_forward, encode_cpu, why_not_built, why_not_cpu
from sparsepeft.ops.sparse_attention.pytorch import torch_forward
from sparsepeft.ops.sparse_attention.similarity import Codes

_MAX_HEAD_SIZE = 256
_MAX_SUBVECTORS = 64  # a query's table has 16 bytes for each
_MAX_KEYS = 1 << 22
_MIN_FLEX_HEAD_SIZE = 16
# FlexAttention's tuned kernels have tiles of 64, those that an outer torch.compile takes of 128 (backward on an H100).
_FLEX_TILE, _FLEX_UNTUNED_TILE = 64, 128


def num_subvectors(codebooks: Tensor | None) -> int:
    """Return M of codebooks (Hkv, M, C, W), 0 of none."""
    return 0 if codebooks is None else codebooks.shape[1]


class AttentionArguments(NamedTuple):
    """What the choice depends on; see :func:`sparse_attention`. A ``block_size`` of 0 means token granularity."""

    query: Tensor
    value: Tensor
    num_subvectors: int
    block_size: int
    inner_product: bool

    @classmethod
    def bind(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        codebooks: Tensor | None,
        *,
        similarity: str = "inner_product",
        granularity: str = "token",
        block_size: int = 64,
        **_: Any,
    ) -> AttentionArguments:
        """Take the arguments of :func:`sparse_attention`."""
        block_size = block_size if granularity == "block" else 0
        return cls(query, value, num_subvectors(codebooks), block_size, similarity == "inner_product")

    @property
    def largest_head(self) -> int:
        """The head size of queries or of values, whichever is larger."""
        return max(self.query.shape[-1], self.value.shape[-1])


def _why_not_cpu(arguments: AttentionArguments) -> str | None:
    query, value, num_codes, _, inner_product = arguments
    return why_not_cpu(query, value, num_codes, inner_product=inner_product)


def _why_not_triton(arguments: AttentionArguments) -> str | None:
    if arguments.block_size:
        return "granularity is 'block', the Triton kernels keep single tokens"
    reason = gpu.why_not_triton(arguments.query)
    if reason is not None:
        return reason
    if arguments.largest_head > _MAX_HEAD_SIZE:
        return f"the head size is {arguments.largest_head}, the Triton kernels take {_MAX_HEAD_SIZE}"
    if arguments.num_subvectors > _MAX_SUBVECTORS:
        return f"there are {arguments.num_subvectors} sub-vectors, the Triton kernels take {_MAX_SUBVECTORS}"
    if arguments.value.shape[2] > _MAX_KEYS:
        return f"there are {arguments.value.shape[2]} keys, the Triton kernels take {_MAX_KEYS}"
    return None


def _why_not_flex(arguments: AttentionArguments) -> str | None:
    query, value, _, block_size, _ = arguments
    if not block_size:
        return "granularity is 'token', FlexAttention takes lists of blocks"
    if not query.is_cuda:
        return None  # eager, forward alone: its own error says so
    if not gpu.HAS_TRITON:
        return "the package triton is not installed, which FlexAttention needs on a GPU"
    if query.dtype not in gpu.DTYPES:
        return f"the tensors are {query.dtype}, FlexAttention takes float32, bfloat16 and float16"
    smallest = min(query.shape[-1], value.shape[-1])
    if smallest < _MIN_FLEX_HEAD_SIZE or arguments.largest_head > _MAX_HEAD_SIZE:
        return (
            f"the head sizes are {smallest} to {arguments.largest_head}, FlexAttention takes {_MIN_FLEX_HEAD_SIZE} to "
            f"{_MAX_HEAD_SIZE}"
        )
    tile = _FLEX_UNTUNED_TILE if torch.compiler.is_compiling() else _FLEX_TILE
    if block_size % tile:
        where = "inside torch.compile " if tile == _FLEX_UNTUNED_TILE else ""
        return f"block_size is {block_size}, FlexAttention's kernels {where}take multiples of {tile}"
    return None


@functools.cache
def why_slower_here() -> str | None:
    """Return why "auto" leaves the compiled kernels alone on this processor, or None.

    On a kind of processor on which nobody has run them they are tried once: a small problem shows whether they are
    right and faster than plain PyTorch, and a warning says so.
    """
    if native.is_proven():
        return None
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 256, 64, generator=generator)
    codebooks = torch.randn(2, 8, 16, 8, generator=generator)
    settings = Settings(True, 32, 0.125, 0.0, True, True, 0)
    visibility = Visibility.of(1, 256, 256, causal=True)
    codes = Codes(encode_cpu(key, codebooks), None, codebooks)
    forms = {
        name: functools.partial(form, query, key, value, codes, visibility, settings)
        for name, form in (("cpu", cpu_forward), ("torch", torch_forward))
    }
    times = fastest("sparse_attention", (), forms)
    is_right = torch.allclose(forms["cpu"]()[0], forms["torch"]()[0], atol=1e-5)
    reason = (
        "they are not right here" if not is_right else "they are slower here" if times["cpu"] > times["torch"] else None
    )
    warnings.warn(
        "sparse attention's compiled kernels have not been run on a processor like this one yet. They were tried: "
        f"{reason or 'they are right and faster than plain PyTorch, so they are used'} ({times['cpu']:.2g} ms against "
        f"{times['torch']:.2g} ms).",
        stacklevel=2,
    )
    return reason


def _why_not_flex_by_itself(arguments: AttentionArguments) -> str | None:
    return None if arguments.query.is_cuda else "on a CPU FlexAttention is slow and has no gradients"


OPERATOR = Operator(
    "sparse_attention",
    AttentionArguments.bind,
    [
        Implementation("reference", 0, "the definition"),
        Implementation("torch", 10, "plain PyTorch in linear memory, on every device and in every dtype"),
        Implementation(
            "cpu",
            20,
            "the compiled kernels compute kept pairs alone",
            why_unavailable=why_not_built,
            why_not=_why_not_cpu,
            why_not_automatic=lambda _: why_slower_here(),
        ),
        Implementation(
            "triton",
            30,
            "the kernels select keys and attend without storing pairs",
            why_unavailable=gpu.why_no_triton,
            why_not=_why_not_triton,
            # Not since they take tables. Once tests/ops/gpu has passed on a GPU, leave has_run out.
            why_not_automatic=lambda arguments: gpu.why_not_triton_by_itself(arguments.query, has_run=False),
        ),
        Implementation(
            "flex",
            30,
            "FlexAttention computes kept blocks alone",
            why_not=_why_not_flex,
            why_not_automatic=_why_not_flex_by_itself,
        ),
    ],
)
