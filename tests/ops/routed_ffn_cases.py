"""FFNs of every form, one run of each (output and all gradients, by name), and what implementations must satisfy.

A case with a router is one of ``routed_ffn``, a case without one of ``exact_ffn``.

Functions at module level, so that they can be handed to the processes of ``triton_aot`` by reference.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sparsepeft.ops import LowRank, Projection, Routing, exact_ffn, route, routed_ffn
from sparsepeft.ops.routed_ffn.pytorch import GroupedProducts, Groups, LoopedProducts
from sparsepeft.ops.routed_ffn.routing import largest_blocks

LORA_RANKS = (2, 3)
# The two ways of ``impl="torch"``, of which it chooses one by device and dtype.
PRODUCTS = {"looped": LoopedProducts, "grouped": GroupedProducts}
_PACKAGE = importlib.import_module("sparsepeft.ops.routed_ffn")  # in ``ops`` its name means the function


@contextlib.contextmanager
def products(impl: str):
    """Yield the implementation to ask for, with that of :data:`PRODUCTS` chosen where one of them is named."""
    if impl not in PRODUCTS:
        yield impl
        return
    with mock.patch.object(_PACKAGE, "choose_torch_products", return_value=PRODUCTS[impl]):
        yield "torch"


@contextlib.contextmanager
def one_choice() -> Iterator[None]:
    """Inside the context every exact FFN chooses the blocks that the first one does: of few tokens, in one chunk."""
    chosen: list[Tensor] = []

    def choose(active: Tensor, weights: Tensor, num_active: int) -> Tensor:
        chosen.extend([] if chosen else [largest_blocks(active, weights, num_active)])
        return chosen[0]

    with contextlib.ExitStack() as stack:
        for module in ("exact", "reference"):
            stack.enter_context(mock.patch(f"{_PACKAGE.__name__}.{module}.largest_blocks", choose))
        yield


class Form(NamedTuple):
    gated: bool
    bias: bool
    trained: bool
    lora: bool

    def __str__(self) -> str:
        words = (("plain", "gated"), ("no bias", "bias"), ("frozen", "trained"), ("no lora", "lora"))
        return "-".join(pair[value] for pair, value in zip(words, self, strict=True))


HALF = (torch.bfloat16, torch.float16)
PLAIN = Form(gated=False, bias=True, trained=True, lora=True)
GATED = Form(gated=True, bias=True, trained=True, lora=True)
FORMS = [Form(*(bool(number >> bit & 1) for bit in range(4))) for number in range(16)]


class Sizes(NamedTuple):
    tokens: int
    hidden: int
    block: int  # neurons in a block, I / G
    blocks: int
    active: int


# What the tiles of a kernel meet.
TILE_SIZES = {
    "no token": Sizes(0, 5, 3, 4, 2),
    "one token": Sizes(1, 5, 3, 4, 1),
    "odd": Sizes(7, 5, 3, 4, 2),
    "several of many": Sizes(30, 20, 5, 6, 3),
    "all blocks": Sizes(7, 48, 16, 4, 4),
    "wider than a tile": Sizes(5, 70, 67, 2, 1),
    "a block of several tiles": Sizes(150, 5, 3, 2, 1),
}


class Case(NamedTuple):
    """Tensors by name; a name says where in the FFN a tensor stands."""

    form: Form
    sizes: Sizes
    tensors: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> Case:
        return self._replace(tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    @property
    def is_routed(self) -> bool:
        return "router.weight" in self.tensors

    def projection(self, name: str, tensors: dict[str, Tensor], dropout: float = 0.0) -> Projection:
        lora = [
            LowRank(tensors[f"{name}.lora{i}.down"], tensors[f"{name}.lora{i}.up"], 0.5 + i, dropout)
            for i in range(len(LORA_RANKS) if self.form.lora else 0)
        ]
        return Projection(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), tuple(lora))

    def trains(self, name: str) -> bool:
        return self.form.trained or "lora" in name or name in ("x", "router.weight", "router.bias")


def make_case(form: Form, sizes: Sizes, dtype: torch.dtype = torch.float64, *, routed: bool = True) -> Case:
    inner = sizes.block * sizes.blocks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype) / max(shape[-1], 1) ** 0.5  # every product is of unit size

    tensors = {"x": torch.randn(sizes.tokens, sizes.hidden, dtype=dtype)}
    if routed:
        tensors |= {"router.weight": normal(sizes.blocks, sizes.hidden), "router.bias": normal(sizes.blocks)}
    maps = {"up": (inner, sizes.hidden), "down": (sizes.hidden, inner)}
    if form.gated:
        maps["gate"] = maps["up"]
    for name, (outputs, inputs) in maps.items():
        tensors[f"{name}.weight"] = normal(outputs, inputs)
        if form.bias:
            tensors[f"{name}.bias"] = normal(outputs)
        for index, rank in enumerate(LORA_RANKS if form.lora else ()):
            tensors[f"{name}.lora{index}.down"] = normal(rank, inputs)
            tensors[f"{name}.lora{index}.up"] = normal(outputs, rank)
    return Case(form, sizes, tensors)


def call(case: Case, tensors: dict[str, Tensor], *, blocks: Tensor | None = None, lora_dropout: float = 0.0, **options):
    """Compute; ``blocks`` overrides what the router chooses."""
    x = tensors["x"]
    up, down = (case.projection(name, tensors, lora_dropout) for name in ("up", "down"))
    options["gate"] = case.projection("gate", tensors, lora_dropout) if case.form.gated else None
    with products(options.pop("impl", "auto")) as impl:
        if not case.is_routed:
            counts = {"num_blocks": case.sizes.blocks, "num_active": case.sizes.active}
            return exact_ffn(x, up, down, impl=impl, **counts, **options)
        routing = route(x, tensors["router.weight"], tensors["router.bias"], num_active=case.sizes.active)
        if blocks is not None:
            routing = Routing(blocks, torch.log_softmax(routing.logits, -1).gather(-1, blocks), routing.logits)
        return routed_ffn(x, up, down, routing, impl=impl, **options)


def run(case: Case, **options) -> dict[str, Tensor]:
    """Output and the gradients of everything that trains."""
    leaves = {name: tensor.clone().requires_grad_(case.trains(name)) for name, tensor in case.tensors.items()}
    output = call(case, leaves, **options)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves.values())
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare by name; the allowed error is relative to a tensor's largest entry, or to 1 where that is smaller."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        scale = max(value.abs().amax().item(), 1.0) if value.numel() else 1.0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def check_case(
    form: Form,
    sizes: Sizes,
    activation: str,
    runs: Iterable[tuple[str, bool]] = (("triton", False), ("triton", True)),
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    device: str = "cpu",
    *,
    routed: bool = True,
) -> None:
    """Implementations, with and without recomputing in backward, against the reference in float64.

    The tolerance for Triton is some tens of float32 roundings (6e-8) of terms of up to 10, which in the router's
    gradient cancel to unit size; how many meet depends on the order in which a processor's matrix products sum up.
    """
    case = make_case(form, sizes, dtype, routed=routed)
    case = case._replace(tensors={name: tensor.to(device) for name, tensor in case.tensors.items()})
    expected = run(case.to(torch.float64), activation=activation, impl="reference")
    for impl, recompute in runs:
        actual = run(case, activation=activation, recompute=recompute, impl=impl)
        assert_all_close({name: value.double() for name, value in actual.items()}, expected, tolerance)


def check_half(case: Case, dtype: torch.dtype, impls: dict[str, str], activation: str, device: str = "cpu") -> None:
    """Each implementation is as close to float32 as the plainer one beside it, the reference or the looped form."""
    case = case.to(dtype)
    case = case._replace(tensors={name: tensor.to(device) for name, tensor in case.tensors.items()})
    tensors, options = case.tensors, {"activation": activation}
    if case.is_routed:
        logits = tensors["x"], tensors["router.weight"], tensors["router.bias"]
        options["blocks"] = route(*logits, num_active=case.sizes.active).blocks
    with one_choice():  # a rounding must not change the choice
        exact = run(case.to(torch.float32), impl="reference", **options)
        results = {impl: run(case, impl=impl, **options) for impl in {*impls, *impls.values()}}
    for (impl, plainer), (name, value) in itertools.product(impls.items(), exact.items()):
        assert results[impl][name].dtype == dtype
        error, allowed = ((results[each][name].float() - value).abs().max() for each in (impl, plainer))
        # Twice the plainer code's error, or, where that is lucky, four roundings of the largest entry: of what enters
        # the activation, of the activation, and of their gradients.
        assert error <= max(2 * allowed, 4 * torch.finfo(dtype).eps * value.abs().max()), (name, impl)


def launch_products(dtype: torch.dtype, weight_dtype: torch.dtype, rank: int) -> None:
    """Every product at the sizes of a block of 1024 to 4096, and of a low-rank update."""
    from sparsepeft.ops.routed_ffn.triton import TritonProducts

    tokens, hidden, block, num_blocks = 64, 1024, 512, 8
    groups = Groups(torch.arange(tokens * 4).view(tokens, 4) % num_blocks, num_blocks)
    products, tile = TritonProducts(groups), groups.whole()
    h = torch.zeros(tokens * 4, block, dtype=dtype)
    for size in (hidden, rank):
        x = torch.zeros(tokens, size, dtype=dtype)
        up = torch.zeros(num_blocks * block, size, dtype=weight_dtype).unflatten(0, (num_blocks, -1))
        down = torch.zeros(size, num_blocks * block, dtype=weight_dtype).unflatten(1, (num_blocks, -1)).permute(1, 2, 0)
        for weight in (up, down):
            products.inner(tile, x, weight)
            products.outer(tile, h, weight)
            products.add_gradient(tile, weight, h, x)
