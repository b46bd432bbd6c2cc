"""exact_ffn: the dense FFN's values; gradients through a token's largest blocks; every implementation alike."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.ops.routed_ffn_cases import (
    FORMS,
    GATED,
    HALF,
    PLAIN,
    TILE_SIZES,
    Case,
    Form,
    Sizes,
    assert_all_close,
    call,
    check_case,
    check_half,
    make_case,
    products,
    run,
)
from tests.ops.test_routed_ffn_cost import addmm_flops, kept_bytes, leaves_of
from tests.ops.triton_aot import interpreted, needs_triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsepeft.ops import LowRank, Projection, exact_ffn, explain
from sparsepeft.ops.routed_ffn import exact, project
from sparsepeft.ops.routed_ffn.projections import ACTIVATIONS
from sparsepeft.ops.routed_ffn.routing import largest_blocks

SIGNS = Form(gated=False, bias=True, trained=False, lora=False)  # plain ReLU keeps signs where nothing reads it
FEW_FORMS = (PLAIN, GATED, SIGNS, Form(gated=True, bias=False, trained=False, lora=True))
SIZES = {
    "no token": Sizes(0, 5, 3, 4, 2),
    "one token": Sizes(1, 5, 3, 4, 1),
    "odd": Sizes(7, 5, 3, 4, 2),
    "several of many": Sizes(130, 48, 16, 8, 3),
    "many small": Sizes(130, 48, 3, 40, 11),
    "all blocks": Sizes(7, 48, 16, 4, 4),
    "several tiles": Sizes(1100, 5, 3, 2, 1),
}


def make(form: Form, sizes: Sizes, dtype: torch.dtype = torch.float64) -> Case:
    return make_case(form, sizes, dtype, routed=False)


def dense(case: Case, tensors: dict[str, Tensor], activation: str) -> Tensor:
    x, function = tensors["x"], ACTIVATIONS[activation]
    entering = project(x, case.projection("up", tensors))
    gated = case.form.gated
    active = function(project(x, case.projection("gate", tensors))) * entering if gated else function(entering)
    return project(active, case.projection("down", tensors))


# Values and gradients


@pytest.mark.parametrize("sizes", SIZES)
def test_looped_matches_reference(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exact._CHUNK_ENTRIES, "cpu", 4000)  # several chunks, the last one of another size
    for form, activation in itertools.product(FORMS if sizes == "odd" else FEW_FORMS, ("relu", "silu")):
        runs = [("looped", False), ("looped", True)]
        check_case(form, SIZES[sizes], activation, runs, torch.float64, 1e-12, routed=False)


@pytest.mark.parametrize("sizes", ["odd", "several of many"])
def test_grouped_matches_reference_in_float32(sizes: str) -> None:
    aligned = SIZES[sizes]._replace(block=8)  # grouped products want a multiple of 16 bytes
    for form, activation in itertools.product(FEW_FORMS, ("relu", "silu")):
        check_case(form, aligned, activation, [("grouped", False)], tolerance=3e-6, routed=False)


@needs_triton
def test_triton_matches_reference_interpreted() -> None:
    interpreted(check_case, GATED, TILE_SIZES["odd"], "silu", (("triton", False), ("triton", True)), routed=False)
    interpreted(check_case, SIGNS, TILE_SIZES["several of many"], "relu", (("triton", False),), routed=False)


@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_half_precision_is_as_close_to_float32_as_the_reference(form: Form) -> None:
    for dtype in HALF:
        check_half(make(form, SIZES["several of many"], torch.float32), dtype, {"looped": "reference"}, "silu")


@pytest.mark.parametrize("gated", [False, True])
def test_reference_has_dense_values_and_the_routed_ffns_gradients(gated: bool) -> None:
    case = make(GATED._replace(gated=gated), SIZES["several of many"])
    actual = run(case, activation="silu", impl="reference")
    torch.testing.assert_close(actual["output"], dense(case, case.tensors, "silu"), rtol=0, atol=1e-12)
    # The same blocks, chosen by hand, in an FFN that computes these alone.
    tensors, sizes = case.tensors, case.sizes
    entering = project(tensors["x"], case.projection("up", tensors))
    active = F.silu(project(tensors["x"], case.projection("gate", tensors))) * entering if gated else F.silu(entering)
    added = (active.square() * tensors["down.weight"].square().sum(0)).view(-1, sizes.blocks, sizes.block).sum(-1)
    router = {"router.weight": torch.zeros(sizes.blocks, sizes.hidden), "router.bias": torch.zeros(sizes.blocks)}
    routed = case._replace(tensors=tensors | {name: tensor.double() for name, tensor in router.items()})
    expected = run(routed, activation="silu", impl="reference", blocks=added.topk(sizes.active).indices)
    for name in actual:
        is_dense = name == "output" or (name.startswith("down.lora") and name.endswith("up"))
        if not is_dense:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-11, msg=name)
        assert not is_dense or not torch.allclose(actual[name], expected[name], atol=1e-3), name


@pytest.mark.parametrize("impl", ["reference", "looped"])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_all_blocks_have_the_dense_gradients(form: Form, impl: str) -> None:
    case = make(form, SIZES["all blocks"])
    for activation in ACTIVATIONS:
        leaves = leaves_of(case)
        output = dense(case, leaves, activation)
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
        expected = {"output": output.detach()} | {
            name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad
        }
        assert_all_close(run(case, activation=activation, impl=impl), expected, tolerance=1e-12)


@pytest.mark.parametrize("form", [*FEW_FORMS[:3], SIGNS._replace(lora=True)], ids=str)
def test_gradcheck_with_dropout(form: Form) -> None:
    case = make(form._replace(bias=True), Sizes(3, 2, 2, 4, 2))
    # Two blocks that never fire, so that the gradient through the others is the value's own.
    name = "gate.bias" if form.gated else "up.bias"
    case.tensors[name].view(4, 2)[::2] = -50.0
    case.tensors[name].view(4, 2)[1::2] += 4.0  # away from ReLU's kink
    leaves = leaves_of(case)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]

    for recompute in (False, True):

        def function(*values: Tensor, recompute: bool = recompute) -> Tensor:
            torch.manual_seed(3)
            options = {"activation": "relu", "impl": "looped", "dropout": 0.4, "lora_dropout": 0.3}
            return call(case, leaves | dict(zip(names, values, strict=True)), recompute=recompute, **options)

        assert torch.autograd.gradcheck(function, [leaves[name] for name in names], fast_mode=True)


def test_of_equal_blocks_the_lowest_is_chosen() -> None:
    for count in (6, 40):  # past the sorted search, too
        blocks = largest_blocks(torch.ones(2, count * 3), torch.ones(count, 3), 2)
        assert blocks.sort(-1).values.tolist() == [[0, 1]] * 2
    active = torch.tensor([[1.0, 1, 0, 2, 0, 0], [-3.0, 0, 1, 1, 1, 1]])
    assert largest_blocks(active, torch.ones(3, 2), 1).tolist() == [[1], [0]]
    assert largest_blocks(active, torch.tensor([[0.1, 0.1], [1, 0.1], [9, 9]]), 1).tolist() == [[1], [2]]


# Surroundings


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_computes_in_its_dtype(trained: bool) -> None:
    case = make(GATED._replace(trained=trained), Sizes(20, 8, 8, 4, 2), torch.float32)
    half = run(case.to(torch.bfloat16), activation="silu", impl="looped")
    leaves = leaves_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(case, leaves, activation="silu", impl="looped")
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    assert torch.equal(output, half["output"])
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == torch.float32
            expected = half[name].float()
            # Autocast's gradients of float32 tensors are not rounded to bfloat16, the others are; column norms are
            # those of unrounded weights, which no choice of blocks hangs on here.
            torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


def test_dropout_follows_the_seed_and_gradient_checkpointing_changes_nothing() -> None:
    case = make(GATED, SIZES["odd"])

    def step(tensors: dict[str, Tensor]) -> Tensor:
        return call(case, tensors, activation="silu", dropout=0.3, lora_dropout=0.2, impl="looped")

    grads, outputs = [], []
    for reentrant, seed in ((None, 5), (False, 5), (True, 5), (None, 6)):
        torch.manual_seed(seed)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
        if reentrant is None:
            output = step(leaves)
        else:  # a reentrant one runs without gradients first
            names = list(leaves)
            output = torch.utils.checkpoint.checkpoint(
                lambda *values, names=names: step(dict(zip(names, values, strict=True))),
                *leaves.values(),
                use_reentrant=reentrant,
            )
        output.square().sum().backward()
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
        outputs.append(output)
    for index in (1, 2):
        assert_all_close(grads[index], grads[0], tolerance=0)
        assert torch.equal(outputs[index], outputs[0])
    assert not torch.equal(outputs[3], outputs[0])


def test_gradients_only_where_required() -> None:
    case = make(GATED, Sizes(20, 8, 8, 4, 2))
    expected = run(case, activation="silu", impl="reference")
    for wanted in ("x", "up.weight", "down.weight", "gate.bias", "down.lora1.down", "down.lora0.up"):
        leaves = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in case.tensors.items()}
        output = call(case, leaves, activation="silu", impl="looped")
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64))
        assert_all_close({wanted: leaves[wanted].grad}, {wanted: expected[wanted]}, tolerance=1e-12)


def test_compiles_with_a_graph_break_and_exports() -> None:
    case = make(GATED, SIZES["odd"])
    expected = run(case, activation="silu", impl="reference")
    torch.compiler.reset()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    output = torch.compile(lambda t: call(case, t, activation="silu").sin(), backend="eager")(leaves)
    torch.testing.assert_close(output, expected["output"].sin(), rtol=0, atol=1e-12)
    output.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(case, case.tensors | {"x": x}, activation="silu")

    x = case.tensors["x"]
    dynamic = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}}
    exported = torch.export.export(Net(), (x,), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(x[:4]), Net()(x[:4]), rtol=0, atol=1e-12)


def test_messages() -> None:
    x, up, down = torch.randn(6, 8), Projection(torch.randn(12, 8)), Projection(torch.randn(8, 12))
    assert explain(exact_ffn, x, up, down, num_blocks=4, num_active=2, activation="relu").impl == "torch"
    with pytest.raises(ValueError, match="num_active is 5, but there are 4 blocks: choose"):
        exact_ffn(x, up, down, num_blocks=4, num_active=5, activation="relu")
    with pytest.raises(ValueError, match="the inner size 12 cannot be cut into 5 equal blocks"):
        exact_ffn(x, up, down, num_blocks=5, num_active=1, activation="relu")


# Cost

COST = Sizes(tokens=640, hidden=32, block=24, blocks=8, active=3)
PAIRS = COST.tokens * COST.active
CHOICE = PAIRS * 4  # int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_kept_are_the_chosen_blocks_alone(gated: bool, dtype: torch.dtype) -> None:
    case = make(Form(gated, True, False, False), COST, torch.float32).to(dtype)
    entering = PAIRS * COST.block * dtype.itemsize * (2 if gated else 1)
    assert kept_bytes(case, activation="silu", impl="looped") == entering + CHOICE
    assert kept_bytes(case, activation="silu", impl="looped", recompute=True) == CHOICE
    with torch.no_grad():
        assert kept_bytes(case, activation="silu", impl="looped") == 0


def test_relu_and_dropout_keep_one_bit_per_chosen_neuron() -> None:
    case = make(SIGNS, COST, torch.float32)
    assert kept_bytes(case, activation="relu", impl="looped") == PAIRS * COST.block / 8 + CHOICE
    assert kept_bytes(case, activation="relu", impl="looped", dropout=0.1) == 2 * PAIRS * COST.block / 8 + CHOICE


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_backward_multiplies_for_the_chosen_blocks_alone(trained: bool, gated: bool) -> None:
    case = make(Form(gated, True, trained, False), COST, torch.float32)
    product = 2 * COST.tokens * COST.block * COST.blocks * COST.hidden  # one projection
    projections = 3 if gated else 2
    leaves = leaves_of(case)
    counting = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=counting) as forward:
        output = call(case, leaves, activation="silu", impl="looped")
    norms = 2 * COST.block * COST.blocks * COST.hidden  # of the columns, once
    assert forward.get_total_flops() == projections * product + norms
    with FlopCounterMode(display=False, custom_mapping=counting) as backward:
        output.backward(torch.ones_like(output))
    assert backward.get_total_flops() == projections * (1 + trained) * product * COST.active / COST.blocks


def test_dropout_zeroes_a_share_and_scales_the_rest() -> None:
    size = 64
    x, identity, zero = torch.ones(100, size, requires_grad=True), torch.eye(size), torch.zeros(size, size)
    only_update = Projection(zero, lora=(LowRank(identity, identity, 1.0, 0.25),))
    for impl, (down, dropout) in itertools.product(
        ("reference", "looped"), ((Projection(identity), 0.25), (only_update, 0.0))
    ):
        with products(impl) as name:
            options = {"num_blocks": 4, "num_active": 2, "activation": "relu", "impl": name}
            output = exact_ffn(x, Projection(identity), down, dropout=dropout, **options)
        kept = output != 0
        torch.testing.assert_close(output[kept], torch.full_like(output[kept], 4 / 3))
        assert abs(kept.float().mean().item() - 0.75) < 0.03  # 5 standard deviations of 6400 draws
