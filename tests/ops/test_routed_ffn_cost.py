"""What the routed FFN costs: bytes kept for backward, multiply-adds; and the load-balancing loss."""

from __future__ import annotations

import pytest
import torch
from tests.ops.routed_ffn_cases import Case, Form, Sizes, call, make_case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsepeft.ops import load_balancing_loss, route, routing_load_balancing_loss
from sparsepeft.ops.routed_ffn.blocks import pack_signs, unpack_signs
from sparsepeft.ops.routed_ffn.pytorch import Groups, LoopedProducts

SIZES = Sizes(tokens=640, hidden=32, block=24, blocks=8, active=3)
PAIRS = SIZES.tokens * SIZES.active
FROZEN = Form(gated=False, bias=True, trained=False, lora=False)
FAST = ("looped", "grouped")


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_(case.trains(name)) for name, tensor in case.tensors.items()}


def kept_bytes(case: Case, **options: object) -> int:
    """Bytes of distinct storages kept for backward, the arguments themselves left out."""
    leaves, kept = leaves_of(case), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(case, leaves, **options)
    for leaf in leaves.values():
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


# The router keeps its log-probabilities (float32) and the choice (int64); the FFN the choice and the log-weights.
ROUTER_BYTES = SIZES.tokens * SIZES.blocks * 4 + PAIRS * (8 + 4)


@pytest.mark.parametrize("impl", FAST)
def test_relu_keeps_one_bit_per_chosen_neuron(impl: str) -> None:
    case = make_case(FROZEN, SIZES, torch.float32)
    signs = PAIRS * SIZES.block / 8
    kept = kept_bytes(case, activation="relu", impl=impl)
    assert signs <= kept <= signs + ROUTER_BYTES
    # Dense code keeps at least (N, I) floats.
    assert signs * 8 * 4 == SIZES.tokens * SIZES.block * SIZES.blocks * 4 * SIZES.active / SIZES.blocks


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_others_keep_what_enters_the_activation_or_nothing(gated: bool, dtype: torch.dtype, impl: str) -> None:
    case = make_case(FROZEN._replace(gated=gated), SIZES, torch.float32).to(dtype)
    entering = PAIRS * SIZES.block * dtype.itemsize * (2 if gated else 1)
    assert entering <= kept_bytes(case, activation="silu", impl=impl) <= entering + ROUTER_BYTES
    assert kept_bytes(case, activation="silu", impl=impl, recompute=True) <= ROUTER_BYTES


@pytest.mark.parametrize("impl", FAST)
def test_low_rank_updates_keep_little_more(impl: str) -> None:
    case = make_case(FROZEN._replace(lora=True), SIZES, torch.float32)
    # Of each of two updates: what up's read of x (before and after scaling and joining), what down's read.
    reads = SIZES.tokens * (2 + 3) * 4
    weights = SIZES.block * SIZES.blocks * (2 + 3) * 4  # joined
    kept = kept_bytes(case, activation="silu", impl=impl, recompute=True)
    assert kept <= ROUTER_BYTES + 3 * reads + 2 * weights


def test_nothing_is_kept_without_gradients() -> None:
    case = make_case(FROZEN, SIZES, torch.float32)
    with torch.no_grad():
        assert kept_bytes(case, activation="relu", impl="looped") == 0


def addmm_flops(_total: list[int], a: list[int], b: list[int], **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_multiply_adds_are_those_of_the_chosen_blocks(
    trained: bool, recompute: bool, activation: str, gated: bool
) -> None:
    case = make_case(FROZEN._replace(trained=trained, gated=gated), SIZES, torch.float32)
    product = 2 * PAIRS * SIZES.block * SIZES.hidden  # one projection of the chosen blocks
    router = 2 * SIZES.tokens * SIZES.hidden * SIZES.blocks
    projections = 3 if gated else 2
    leaves = leaves_of(case)
    with FlopCounterMode(display=False) as forward:
        output = call(case, leaves, activation=activation, recompute=recompute, impl="looped")
    assert forward.get_total_flops() == projections * product + router
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as backward:
        output.backward(torch.ones_like(output))
    signs = activation == "relu" and not gated and not trained
    again = projections - 1 if recompute and not signs else 0
    weights = projections if trained else 0
    assert backward.get_total_flops() == (projections + again + weights) * product + 2 * router


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (8, 16), (7, 9)])
def test_signs_survive_packing(shape: tuple[int, ...]) -> None:
    h = torch.randn(shape)
    h[h.abs() < 0.2] = 0.0
    packed = pack_signs(h)
    assert packed.numel() == -(-h.numel() // 8)
    assert torch.equal(unpack_signs(packed, shape), (h > 0).to(torch.uint8))


def test_signs_of_nan_are_kept_as_positive() -> None:
    h = torch.tensor([[torch.nan, -1.0, -0.0, torch.inf]])
    assert unpack_signs(pack_signs(h), (1, 4)).tolist() == [[1, 0, 0, 1]]


# The load-balancing loss


def test_balance_is_one_when_even_and_largest_when_always_the_same() -> None:
    even = torch.eye(8).repeat(3, 1) * 50
    blocks = even.topk(1).indices
    torch.testing.assert_close(routing_load_balancing_loss(even, blocks), torch.tensor(1.0))
    same = torch.zeros(24, 8)
    same[:, :2] = 50.0
    loss = routing_load_balancing_loss(same, torch.tensor([[0, 1]]).expand(24, 2))
    torch.testing.assert_close(loss, torch.tensor(8 / 2))


def test_balance_ignores_padding() -> None:
    x, router = torch.randn(2, 5, 6), torch.randn(4, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    routing = route(x, router, num_active=2)
    real = route(x[mask.bool()], router, num_active=2)
    expected = routing_load_balancing_loss(real.logits, real.blocks)
    torch.testing.assert_close(routing_load_balancing_loss(routing.logits, routing.blocks, mask), expected)
    assert not torch.isclose(routing_load_balancing_loss(routing.logits, routing.blocks), expected)
    assert routing_load_balancing_loss(routing.logits, routing.blocks, torch.zeros(2, 5)).item() == 0
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), but 10 tokens were routed"):
        routing_load_balancing_loss(routing.logits, routing.blocks, torch.ones(2, 4))


def test_balance_is_that_of_a_memory() -> None:
    x, keys, mask = torch.randn(3, 4, 6), torch.randn(5, 6), torch.rand(3, 4) > 0.3
    routing = route(x, keys, num_active=2)
    for counted in (None, mask):
        loss = routing_load_balancing_loss(routing.logits, routing.blocks, counted)
        torch.testing.assert_close(loss, load_balancing_loss(x, keys, top_k=2, mask=counted))
    assert load_balancing_loss(x, keys, top_k=2, mask=torch.zeros(3, 4)).item() == 0


def test_following_the_balance_evens_the_choice() -> None:
    x = torch.randn(256, 8) + 1.0
    router = (torch.randn(4, 8) + torch.tensor([0.5, 0, 0, 0]).unsqueeze(1)).requires_grad_()
    losses = []
    for _ in range(200):
        routing = route(x, router, num_active=1)
        loss = routing_load_balancing_loss(routing.logits, routing.blocks)
        (grad,) = torch.autograd.grad(loss, router)
        with torch.no_grad():
            router -= grad
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_have_each_pair_once_and_in_half_precision_few_sizes(dtype: torch.dtype) -> None:
    """In half precision the CPU's library makes code for each number of rows, at the price of many products."""
    blocks = torch.stack([torch.randperm(6)[:2] for _ in range(1700)])
    products = LoopedProducts(Groups(blocks, 7))  # the last has no pair
    slots: list[int] = []
    for tile in products.tiles(64, dtype):
        assert torch.equal(tile.tokens, tile.slots // 2)
        for block, rows in tile.segments:
            size = rows.stop - rows.start
            assert size <= 512
            assert dtype == torch.float32 or size % 64 == 0
            real = slice(None) if tile.is_filler is None else ~tile.is_filler[rows]
            assert (blocks.flatten()[tile.slots[rows][real]] == block).all()
        h = torch.randn(len(tile.slots), 3)
        assert torch.equal(tile.unpack(tile.pack(h)), products.without_fillers(tile, h))
        slots += tile.pack(tile.slots).tolist()
    assert sorted(slots) == list(range(blocks.numel()))
