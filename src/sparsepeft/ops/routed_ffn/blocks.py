"""What computing block by block works with: a plan, tensors cut into blocks, dropout drawn again, and packed signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepeft.ops.routed_ffn.projections import Activation, Projection, read_low_rank
from sparsepeft.ops.routed_ffn.pytorch import MakeProducts


class Plan(NamedTuple):
    """What is known before the first product."""

    make_products: MakeProducts
    num_blocks: int
    num_inlets: int  # 2 where the FFN is gated
    activation: Activation
    dropouts: tuple[float, ...]  # of the activation, then of what each update of the down projection reads
    seed: int
    keep: str  # for backward: "nothing" (recompute), "signs", or "inner" (what enters the activation)

    def activate(self, inner: list[Tensor]) -> Tensor:
        """Return the activation, (n, W), from what ``up`` gave, or ``gate`` and ``up``."""
        first = self.activation(inner[0])
        return first if self.num_inlets == 1 else first * inner[1]


class Inlet(NamedTuple):
    """A projection into the inner dimension; what its updates read of x is taken beforehand."""

    weight: Tensor  # (G, W, D)
    bias: Tensor | None  # (G, W)
    reads: Tensor | None  # (N, R), the scaling included
    low_up: Tensor | None  # (G, W, R)


class Arguments(NamedTuple):
    """The differentiable arguments, or their gradients, of which any may be None."""

    x: Tensor  # (N, D)
    log_weights: Tensor  # (N, G'); None where no router chose the blocks
    inlets: list[Inlet]
    outlets: list[Tensor]  # (G, W, D) of the down projection, then (G, W, r) of each of its updates

    @classmethod
    def of(cls, plan: Plan, tensors: Sequence[Any]) -> Arguments:
        """Name the flat tensors: x, log-weights, four of each inlet, the outlets; and cut them into blocks."""
        x, log_weights, *rest = tensors
        count = 4 * plan.num_inlets
        inlets = []
        for start in range(0, count, 4):
            weight, bias, reads, low_up = rest[start : start + 4]
            inlets.append(Inlet(_rows(weight, plan), _rows(bias, plan), reads, _rows(low_up, plan)))
        return cls(x, log_weights, inlets, [_columns(tensor, plan) for tensor in rest[count:]])


def differentiable(
    x: Tensor, log_weights: Tensor | None, inlets: Sequence[Projection], down: Projection
) -> list[Tensor | None]:
    """Return the differentiable arguments, flat, as :meth:`Arguments.of` takes them.

    What a low-rank update reads from x, and what it adds to the output, is small and dense: it stays outside of the
    functions that take these, as does the down projection's bias; see :func:`add_updates`.
    """
    tensors: list[Tensor | None] = [x, log_weights]
    for projection in inlets:
        reads = [read_low_rank(x, low) for low in projection.lora]
        low_ups = [low.up.to(x.dtype) for low in projection.lora]
        tensors += [projection.weight, projection.bias]
        tensors += [torch.cat(reads, 1), torch.cat(low_ups, 1)] if reads else [None, None]
    return [*tensors, down.weight, *(low.down.to(x.dtype) for low in down.lora)]


def add_updates(output: Tensor, reads: Sequence[Tensor], down: Projection) -> Tensor:
    """Return the output, (N, D), with what the down projection's updates add, given what they read, and its bias."""
    for low, read in zip(down.lora, reads, strict=True):
        output = output + low.scaling * F.linear(read, low.up.to(output.dtype))
    return output if down.bias is None else output + down.bias.to(output.dtype)


def what_to_keep(tensors: Sequence[Any], num_inlets: int, activation: Activation, *, recompute: bool) -> str:
    """Return :attr:`Plan.keep` for the differentiable arguments."""
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "nothing"
    # A plain ReLU's derivative is a sign; its values matter where they meet a trainable weight.
    outlets = tensors[2 + 4 * num_inlets :]
    if activation is F.relu and num_inlets == 1 and not any(tensor.requires_grad for tensor in outlets):
        return "signs"
    return "nothing" if recompute else "inner"


def precise_places(plan: Plan) -> set[int]:
    """Return the places in the flat tensors whose gradients are summed in float32 at least.

    Those of x and of what updates read are a sum over a token's blocks, those of biases one over a block's tokens; the
    log-weights' are a scalar of each pair.
    """
    return {0, 1, *(place + 4 * inlet for inlet in range(plan.num_inlets) for place in (3, 4))}


def _rows(tensor: Any, plan: Plan) -> Any:
    return None if tensor is None else tensor.unflatten(0, (plan.num_blocks, -1))


def _columns(tensor: Any, plan: Plan) -> Any:
    return None if tensor is None else tensor.unflatten(1, (plan.num_blocks, -1)).permute(1, 2, 0)


# Dropout that backward draws again instead of remembering it


def draw_seed() -> int:
    """Return a seed from the default CPU generator, so that ``torch.manual_seed`` settles every draw."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()).item())


class Draws:
    """A sequence of dropout masks; the same seed and the same order of calls give the same masks."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def masks(self, like: Tensor, probabilities: tuple[float, ...]) -> list[Tensor | None]:
        """Return a mask for each probability: zeros with it, else 1 / (1 - probability); None if nothing is dropped."""
        return [self._mask(like, 1 - probability) if probability else None for probability in probabilities]

    def _mask(self, like: Tensor, keep: float) -> Tensor:
        return torch.empty_like(like).bernoulli_(keep, generator=self._generator).div_(keep)


def masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the product, or the tensor itself where there is no mask."""
    return tensor if mask is None else tensor * mask


# Which entries are positive, at one bit each


def pack_signs(h: Tensor) -> Tensor:
    """Return one bit per entry of ``h``: 0 where it is at most 0, else 1 (for NaN, too, so that gradients show it)."""
    bits = (h <= 0).logical_not_().flatten().view(torch.uint8)
    # Bit i of byte j is entry i * num_bytes + j: eight passes over long rows, which vectorise.
    planes = F.pad(bits, (0, -bits.numel() % 8)).view(8, -1)
    packed = planes[0].clone()
    for place in range(1, 8):
        packed.add_(planes[place], alpha=1 << place)
    return packed


def unpack_signs(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bits of :func:`pack_signs` as zeros and ones (uint8) of the original shape."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    bits = (packed >> places) & 1
    numel = 1
    for size in shape:
        numel *= size
    return bits.flatten()[:numel].view(shape)
