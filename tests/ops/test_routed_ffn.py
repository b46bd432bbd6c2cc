"""routed_ffn: every implementation against the reference, in outputs and in every gradient."""

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
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sparsepeft.ops import LowRank, Projection, Routing, explain, gpu, route, routed_ffn
from sparsepeft.ops.routed_ffn.projections import ACTIVATIONS, resolve_activation
from sparsepeft.ops.routed_ffn.pytorch import GroupedProducts, LoopedProducts, choose_torch_products

FAST = ("looped", "grouped")
ALL = ("reference", *FAST)
SIGNS = Form(gated=False, bias=True, trained=False, lora=True)  # ReLU keeps signs where its weights are frozen
FEW_FORMS = (PLAIN, GATED, SIGNS, Form(gated=True, bias=False, trained=False, lora=False))

SIZES = {
    "no token": Sizes(0, 5, 3, 4, 2),
    "one token": Sizes(1, 5, 3, 4, 1),
    "odd": Sizes(7, 5, 3, 4, 2),
    "one of many": Sizes(130, 48, 3, 16, 1),
    "several of many": Sizes(130, 48, 16, 8, 3),
    "all blocks": Sizes(7, 48, 16, 4, 4),
    "one block": Sizes(7, 5, 16, 1, 1),
    "several tiles": Sizes(1100, 5, 3, 2, 1),
}
# Grouped products: W a multiple of 16 bytes; D (5) and the ranks (2 + 3) are none.
ALIGNED = {
    "no token": Sizes(0, 5, 8, 4, 2),
    "one token": Sizes(1, 5, 8, 4, 1),
    "odd": Sizes(7, 5, 8, 4, 2),
    "several of many": Sizes(130, 48, 16, 8, 3),
    "all blocks": Sizes(7, 48, 16, 4, 4),
}


@pytest.mark.parametrize("sizes", SIZES)
def test_looped_matches_reference(sizes: str) -> None:
    for form, activation in itertools.product(FORMS if sizes == "odd" else FEW_FORMS, ("relu", "silu")):
        runs = [("looped", False), ("looped", True)]
        check_case(form, SIZES[sizes], activation, runs, torch.float64, 1e-12)  # only the order of summation differs


@pytest.mark.parametrize("sizes", ALIGNED)
def test_both_match_reference_in_float32(sizes: str) -> None:
    for form, activation in itertools.product(FORMS if sizes == "odd" else FEW_FORMS, ("relu", "silu")):
        runs = [("looped", False), ("grouped", False), ("grouped", True)]
        # Some tens of float32 roundings (6e-8) in sums of at most 130 terms of unit size.
        check_case(form, ALIGNED[sizes], activation, runs, tolerance=3e-6)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("form", FEW_FORMS, ids=str)
def test_half_precision_is_as_close_to_float32_as_the_reference(form: Form, activation: str) -> None:
    for dtype in HALF:
        case = make_case(form, SIZES["several of many"], torch.float32)
        if activation == "relu":
            make_inner_products_exact(case)  # a rounding to the other side of ReLU's kink is no error
        check_half(case, dtype, dict.fromkeys(FAST, "reference"), activation)


def test_biases_sum_the_gradients_of_their_tokens_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU adds up bfloat16 in bfloat16: of a thousand tokens the sum would lose several of its eight bits.
    add, dtypes = LoopedProducts.add_bias_gradient, []

    def spy(self: LoopedProducts, tile: object, total: Tensor, h: Tensor) -> None:
        dtypes.append(total.dtype)
        add(self, tile, total, h)

    monkeypatch.setattr(LoopedProducts, "add_bias_gradient", spy)
    run(make_case(GATED, SIZES["odd"]).to(torch.bfloat16), activation="silu", impl="looped")
    assert set(dtypes) == {torch.float32}


def make_inner_products_exact(case: Case) -> None:
    """Small integers: what enters the activation is a multiple of 1/2 below 128, which bfloat16 holds exactly."""
    for name, tensor in case.tensors.items():
        if name.startswith(("x", "up", "gate")):
            tensor.copy_(torch.randint(-1, 2, tensor.shape))


@pytest.mark.parametrize(("form", "activation"), [(PLAIN, "gelu_new"), (GATED, "silu")], ids=str)
def test_gradcheck_of_the_reference(form: Form, activation: str) -> None:
    case = make_case(form, Sizes(3, 4, 2, 3, 2))
    scores = case.tensors["x"] @ case.tensors["router.weight"].T + case.tensors["router.bias"]
    scores = scores.sort(-1, descending=True).values
    assert (scores[:, 1] - scores[:, 2]).min() > 1e-3  # away from ties: no choice flips
    check_gradients(case, activation=activation, impl="reference")


@pytest.mark.parametrize("form", FEW_FORMS[:3], ids=str)
def test_gradcheck_with_dropout_drawn_again(form: Form) -> None:
    case = make_case(form, Sizes(3, 2, 2, 3, 2))
    # ReLU's kink is far from every drawn value, at this seed.
    for activation, recompute in itertools.product(("relu", "silu"), (False, True)):
        check_gradients(
            case, fast=True, activation=activation, impl="looped", recompute=recompute, dropout=0.4, lora_dropout=0.3
        )


def check_gradients(case: Case, fast: bool = False, **options: object) -> None:
    """Gradcheck, except for the router: its factor is 1 whatever it says, so finite differences see nothing."""
    leaves = {name: t.clone().requires_grad_(case.trains(name)) for name, t in case.tensors.items()}
    names = [name for name, leaf in leaves.items() if leaf.requires_grad and not name.startswith("router")]
    with torch.no_grad():
        blocks = route(leaves["x"], leaves["router.weight"], leaves["router.bias"], num_active=2).blocks

    def function(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        tensors = {name: leaf.detach() for name, leaf in leaves.items()} | dict(zip(names, values, strict=True))
        # The routing is held fixed: x reaches the output through the FFN alone.
        logits = torch.zeros(case.sizes.tokens, case.sizes.blocks, dtype=torch.float64)
        routing = Routing(blocks, logits[:, :2], logits)
        dropout = options.get("lora_dropout", 0.0)
        maps = {name: case.projection(name, tensors, dropout) for name in ("up", "down", *("gate",) * case.form.gated)}
        rest = {name: value for name, value in options.items() if name != "lora_dropout"}
        with products(str(rest.pop("impl"))) as impl:
            return routed_ffn(tensors["x"], maps["up"], maps["down"], routing, gate=maps.get("gate"), impl=impl, **rest)

    assert torch.autograd.gradcheck(function, [leaves[name] for name in names], fast_mode=fast)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_router_gradient_is_the_agreement_with_each_block(gated: bool, frozen: bool, impl: str) -> None:
    hidden, block, num_blocks, active, tokens = 6, 4, 5, 3, 9
    inner = block * num_blocks
    x, grad_output = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    up, gate, bias = torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(inner)
    down = torch.randn(hidden, inner).requires_grad_(not frozen)
    router = torch.randn(num_blocks, hidden).requires_grad_()
    routing = route(x, router, num_active=active)
    gate_map = Projection(gate) if gated else None
    with products(impl) as name:
        maps = Projection(up, bias), Projection(down)
        routed_ffn(x, *maps, routing, gate=gate_map, activation="relu", impl=name).backward(grad_output)
    # d loss / d w_g = <grad, block's output> / w_g, then through the softmax over all blocks.
    with torch.no_grad():
        weights = torch.softmax(x @ router.T, -1)
        grad_weights = torch.zeros(tokens, num_blocks)
        for token, choice in itertools.product(range(tokens), range(active)):
            index = int(routing.blocks[token, choice])
            rows = slice(index * block, (index + 1) * block)
            entering = up[rows] @ x[token] + bias[rows]
            activated = F.relu(gate[rows] @ x[token]) * entering if gated else F.relu(entering)
            agreement = grad_output[token] @ (down[:, rows] @ activated)
            grad_weights[token, index] = agreement / weights[token, index]
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        expected = grad_logits.T @ x
    torch.testing.assert_close(router.grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# All blocks chosen: the dense FFN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("gated", [False, True])
def test_all_blocks_are_the_dense_ffn(gated: bool, dtype: torch.dtype) -> None:
    case = make_case(Form(gated, True, True, False), SIZES["all blocks"]).to(dtype)
    tensors = case.tensors
    maps = {n: (tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in ("up", "down", *(("gate",) if gated else ()))}
    entering = F.linear(tensors["x"], *maps["up"])
    for activation, function in ACTIVATIONS.items():
        active = function(F.linear(tensors["x"], *maps["gate"])) * entering if gated else function(entering)
        dense = F.linear(active, *maps["down"])
        assert torch.equal(call(case, tensors, activation=activation, impl="reference"), dense)
        looped = call(case, tensors, activation=activation, impl="looped")
        # Products over four blocks, each rounded to the dtype; their sum is taken in float32 at least.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(looped, dense, rtol=0, atol=8 * eps * dense.abs().max().item())


# Which blocks


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("favourite", [0, 3])
def test_all_tokens_to_one_block(favourite: int, impl: str) -> None:
    sizes = Sizes(33, 8, 8, 4, 1)
    case = make_case(GATED, sizes, torch.float32)
    case.tensors["router.bias"][favourite] = 1e4
    expected = run(case, activation="silu", impl="reference")
    actual = run(case, activation="silu", impl=impl)
    assert_all_close(actual, expected, tolerance=3e-6)
    unused = torch.ones(4, dtype=torch.bool)
    unused[favourite] = False
    assert not actual["up.weight"].view(4, 8, 8)[unused].any()
    assert not actual["down.weight"].view(8, 4, 8)[:, unused].any()
    assert actual["up.weight"].view(4, 8, 8)[favourite].any()


def test_route_picks_the_highest_logits_and_of_equal_ones_the_lowest_block() -> None:
    x, weight, bias = torch.randn(2, 3, 7), torch.randn(5, 7), torch.randn(5)
    routing = route(x, weight, bias, num_active=3)
    logits = (x @ weight.T + bias).view(6, 5)
    torch.testing.assert_close(routing.logits, logits)
    assert routing.blocks.sort(-1).values.tolist() == logits.topk(3).indices.sort(-1).values.tolist()
    torch.testing.assert_close(routing.log_weights.exp(), logits.softmax(-1).gather(-1, routing.blocks))
    routing = route(torch.randn(5, 3), torch.zeros(6, 3), num_active=2)
    assert routing.blocks.sort(-1).values.tolist() == [[0, 1]] * 5
    torch.testing.assert_close(routing.log_weights, torch.full((5, 2), 1 / 6).log())
    weight = torch.zeros(40, 3)  # past the sorted search
    weight[[7, 21, 30]] = 1.0
    assert route(torch.ones(4, 3), weight, num_active=2).blocks.sort(-1).values.tolist() == [[7, 21]] * 4


def test_extreme_logits_keep_gradients_finite() -> None:
    # A probability of e^-200 is zero in float32; its logarithm is not.
    case = make_case(PLAIN, Sizes(9, 8, 8, 4, 2), torch.float32)
    case.tensors["router.bias"][0] = 200.0
    expected = run(case, activation="relu", impl="reference")
    assert all(value.isfinite().all() for value in expected.values())
    assert_all_close(run(case, activation="relu", impl="looped"), expected, tolerance=3e-6)


# Layouts, dtypes, surroundings


@pytest.mark.parametrize("impl", ALL)
def test_any_layout_of_x(impl: str) -> None:
    case = make_case(PLAIN, Sizes(24, 8, 8, 4, 2), torch.float32)
    x = case.tensors["x"]
    expected = call(case, case.tensors, activation="relu", impl=impl)
    backing = torch.stack([x, -x], dim=1)  # rows two apart
    layouts = {
        "leading dimensions": x.view(2, 3, 4, 8),
        "strided rows": backing[:, 0],
        "transposed": x.view(4, 6, 8).transpose(0, 1).contiguous().transpose(0, 1),
        "column-major": x.t().contiguous().t(),
    }
    for name, value in layouts.items():
        leaf = value.detach().requires_grad_()
        output = call(case, case.tensors | {"x": leaf}, activation="relu", impl=impl)
        assert output.shape == value.shape, name
        torch.testing.assert_close(output.reshape(24, 8), expected, rtol=0, atol=1e-6)
        output.sum().backward()  # an expanded gradient
        reference = x.clone().requires_grad_()
        call(case, case.tensors | {"x": reference}, activation="relu", impl="reference").sum().backward()
        torch.testing.assert_close(leaf.grad.reshape(24, 8), reference.grad, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("impl", "trained"), [("reference", True), ("looped", True), ("looped", False), ("grouped", True)]
)
def test_autocast_computes_in_its_dtype(impl: str, trained: bool) -> None:
    case = make_case(Form(True, True, trained, True), Sizes(20, 8, 8, 4, 2), torch.float32)
    x, weight, bias = (case.tensors[name] for name in ("x", "router.weight", "router.bias"))
    blocks = route(x, weight, bias, num_active=case.sizes.active).blocks
    half = run(case.to(torch.bfloat16), activation="silu", impl=impl, blocks=blocks)
    leaves = {name: t.clone().requires_grad_(case.trains(name)) for name, t in case.tensors.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = call(case, leaves, activation="silu", impl=impl, blocks=blocks)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        output.backward(grad_output)  # inside: backward must not be cast a second time
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, half["output"], rtol=0, atol=0)
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == torch.float32
            expected = half[name].float()
            # Autocast's gradients of float32 tensors are not rounded to bfloat16, the others are.
            torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=2**-7 * expected.abs().max().item())


def test_float32_updates_on_half_precision_weights() -> None:
    case = make_case(Form(True, True, False, True), Sizes(20, 8, 8, 4, 2), torch.float32)
    mixed = {n: t if "lora" in n or "router" in n else t.to(torch.bfloat16) for n, t in case.tensors.items()}
    leaves = {name: t.clone().requires_grad_(case.trains(name)) for name, t in mixed.items()}
    output = call(case, leaves, activation="silu", impl="looped")
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is None or leaf.grad.dtype == leaf.dtype, name


@pytest.mark.parametrize("impl", ["reference", "looped"])
def test_low_rank_updates_equal_merged_weights(impl: str) -> None:
    case = make_case(GATED, SIZES["several of many"])
    merged = dict(case.tensors)
    for name in ("up", "down", "gate"):
        for low in case.projection(name, case.tensors).lora:
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + low.scaling * low.up @ low.down
    plain = Case(GATED._replace(lora=False), case.sizes, merged)
    updated, expected = (call(c, c.tensors, activation="silu", impl=impl) for c in (case, plain))
    torch.testing.assert_close(updated, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ALL)
def test_dropout_zeroes_a_share_and_scales_the_rest(impl: str) -> None:
    size, blocks = 64, 4
    x, identity, zero = torch.ones(100, size), torch.eye(size), torch.zeros(size, size)
    routing = route(x, torch.zeros(blocks, size), num_active=blocks)
    through = Projection(identity)
    only_update = Projection(zero, lora=(LowRank(identity, identity, 1.0, 0.25),))
    with products(impl) as name:
        cases = {
            "activation": routed_ffn(x, through, through, routing, activation="relu", dropout=0.25, impl=name),
            "down": routed_ffn(x, through, only_update, routing, activation="relu", impl=name),
            "up": routed_ffn(x, only_update, through, routing, activation="relu", impl=name),
        }
    for place, output in cases.items():
        kept = output != 0
        torch.testing.assert_close(output[kept], torch.full_like(output[kept], 4 / 3))
        assert abs(kept.float().mean().item() - 0.75) < 0.03, place  # 5 standard deviations of 6400 draws


@pytest.mark.parametrize("impl", FAST)
def test_gradients_only_where_required(impl: str) -> None:
    case = make_case(GATED, Sizes(20, 8, 8, 4, 2), torch.float32)
    expected = run(case, activation="silu", impl="reference")
    for wanted in ("x", "router.weight", "up.weight", "down.weight", "gate.bias", "down.lora1.down"):
        leaves = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in case.tensors.items()}
        output = call(case, leaves, activation="silu", impl=impl)
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).float())
        assert_all_close({wanted: leaves[wanted].grad}, {wanted: expected[wanted]}, tolerance=3e-6)
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


def test_a_callable_activation() -> None:
    case = make_case(GATED, SIZES["odd"])
    function = torch.nn.SiLU()
    assert_all_close(
        run(case, activation=function, impl="looped"), run(case, activation="silu", impl="reference"), tolerance=1e-12
    )
    assert resolve_activation(torch.nn.ReLU()) is resolve_activation("relu") is resolve_activation(torch.relu)


def test_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        torch.testing.assert_close(function(x), ACT2FN[name](x), rtol=0, atol=1e-9)


def test_compiles_with_a_graph_break() -> None:
    case = make_case(GATED, SIZES["odd"])
    expected = run(case, activation="silu", impl="reference")
    torch.compiler.reset()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    compiled = torch.compile(lambda t: call(case, t, activation="silu").sin(), backend="eager")
    output = compiled(leaves)
    torch.testing.assert_close(output, expected["output"].sin(), rtol=0, atol=1e-12)
    output.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_exports_with_any_number_of_tokens() -> None:
    case = make_case(GATED._replace(trained=False), Sizes(12, 8, 8, 4, 2), torch.float32)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(case, case.tensors | {"x": x}, activation="silu")

    x = case.tensors["x"]
    dynamic = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}}
    exported = torch.export.export(Net(), (x,), dynamic_shapes=dynamic).module()
    for length in (2, 7, 12):
        # Sums in another order: some roundings of float32, whose size is that of the largest entries, about 20.
        torch.testing.assert_close(exported(x[:length]), Net()(x[:length]), rtol=1e-6, atol=3e-6)


def test_dropout_follows_the_seed_and_gradient_checkpointing_changes_nothing() -> None:
    case = make_case(GATED, SIZES["odd"])

    def step(tensors: dict[str, Tensor]) -> Tensor:
        return call(case, tensors, activation="silu", dropout=0.3, lora_dropout=0.2, impl="looped")

    grads, outputs = [], []
    for checkpointed, seed in ((False, 5), (True, 5), (False, 6)):
        torch.manual_seed(seed)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
        output = torch.utils.checkpoint.checkpoint(step, leaves, use_reentrant=False) if checkpointed else step(leaves)
        output.square().sum().backward()
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
        outputs.append(output)
    assert_all_close(grads[1], grads[0], tolerance=0)
    assert torch.equal(outputs[1], outputs[0])
    assert not torch.equal(outputs[2], outputs[0])


def test_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str, dtype: torch.dtype) -> tuple[str, str | None]:
        with FakeTensorMode():
            x, weight, down_weight = (torch.empty(s, dtype=dtype, device=device) for s in ((6, 8), (64, 8), (8, 64)))
            routing = Routing(*(torch.empty(6, n, device=device) for n in (2, 2, 4)))
        up, down = Projection(weight), Projection(down_weight)
        explanation = explain(routed_ffn, x, up, down, routing, activation="relu")
        return explanation.impl, explanation.others.get("triton")

    assert chosen("cpu", torch.float32)[0] == "torch"
    assert "torch.float64" in str(chosen("cuda", torch.float64)[1])
    monkeypatch.setattr(gpu, "HAS_TRITON", True)
    assert chosen("cuda", torch.bfloat16) == ("triton", None)
    monkeypatch.setattr(gpu, "HAS_TRITON", False)
    assert "pip install triton" in str(chosen("cuda", torch.bfloat16)[1])
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert chosen("cuda", torch.bfloat16)[0] == "reference"


def test_torch_takes_grouped_products_where_it_has_kernels_for_them() -> None:
    assert choose_torch_products("cuda", torch.bfloat16, 512) is GroupedProducts
    for device, dtype, block_size in (
        ("cuda", torch.bfloat16, 100),  # rows of no multiple of 16 bytes
        ("cuda", torch.float32, 512),
        ("cpu", torch.bfloat16, 512),
    ):
        assert choose_torch_products(device, dtype, block_size) is LoopedProducts


# Errors


def arguments(**changes: object) -> dict[str, object]:
    x = torch.randn(6, 5)
    valid: dict[str, object] = {
        "x": x,
        "up": Projection(torch.randn(12, 5)),
        "down": Projection(torch.randn(5, 12)),
        "routing": route(x, torch.randn(4, 5), num_active=2),
        "activation": "relu",
    }
    return valid | changes


BAD_ARGUMENTS = [
    ({"activation": "swiglu"}, ValueError, "activation is 'swiglu'; expected one of relu, "),
    ({"impl": "dense"}, ValueError, "impl is 'dense'; expected one of auto, triton, torch, reference"),
    ({"impl": "looped"}, ValueError, "impl is 'looped'; it is called 'torch' now"),
    ({"dropout": 1.0}, ValueError, "dropout is 1.0; expected a probability"),
    ({"x": torch.ones(6, 5, dtype=torch.long)}, TypeError, "x has dtype torch.int64; expected a floating"),
    ({"x": torch.ones(())}, ValueError, "x is a scalar"),
    ({"x": torch.ones(7, 5)}, ValueError, r"routing.blocks has shape \(6, 2\), but x has 7 tokens"),
    ({"x": torch.ones(6, 4)}, ValueError, r"up.weight has shape \(12, 5\); expected \(12, 4\)"),
    ({"up": Projection(torch.ones(12))}, ValueError, r"up.weight has shape \(12,\); expected \(out, in\)"),
    (
        {"up": Projection(torch.ones(10, 5)), "down": Projection(torch.ones(5, 10))},
        ValueError,
        "the inner size 10 cannot be cut into 4 equal blocks: choose a divisor, one of 1, 2, 5, 10",
    ),
    ({"down": Projection(torch.ones(12, 5))}, ValueError, r"down.weight has shape \(12, 5\); expected \(12, 12\)"),
    ({"gate": Projection(torch.ones(11, 5))}, ValueError, r"gate.weight has shape \(11, 5\); expected \(12, 5\)"),
    ({"up": Projection(torch.ones(12, 5), torch.ones(5))}, ValueError, r"up.bias has shape \(5,\); expected \(12,\)"),
    (
        {"up": Projection(torch.ones(12, 5, dtype=torch.int8))},
        TypeError,
        "up.weight has dtype torch.int8; expected a floating-point tensor",
    ),
    (
        {"up": Projection(torch.ones(12, 5), lora=(LowRank(torch.ones(5, 2), torch.ones(12, 2)),))},
        ValueError,
        r"up.lora\[0\].up has shape \(12, 2\); expected \(12, 5\)|up.lora\[0\].down has shape",
    ),
    (
        {"up": Projection(torch.ones(12, 5), lora=(LowRank(torch.ones(2, 5), torch.ones(12, 2), 1.0, 1.5),))},
        ValueError,
        r"up.lora\[0\].dropout is 1.5",
    ),
]


def test_bad_arguments() -> None:
    for changes, error, message in BAD_ARGUMENTS:
        with pytest.raises(error, match=message):
            routed_ffn(**arguments(**changes))


BAD_ROUTES = [
    ({"num_active": 5}, ValueError, "num_active is 5, but the router has 4 blocks: choose 1 <= num_active <= 4"),
    ({"num_active": 0}, ValueError, "num_active is 0"),
    ({"num_active": 2.0}, TypeError, "num_active is 2.0; expected an int between 1 and 4"),
    ({"num_active": True}, TypeError, "num_active is True"),
    ({"router_weight": torch.ones(4, 6)}, ValueError, r"router_weight has shape \(4, 6\); expected \(G, 5\)"),
    ({"router_weight": torch.ones(5)}, ValueError, r"router_weight has shape \(5,\)"),
    ({"router_bias": torch.ones(5)}, ValueError, r"router_bias has shape \(5,\); expected \(4,\)"),
    ({"x": torch.ones(6, 5, dtype=torch.long)}, TypeError, "x has dtype torch.int64"),
    ({"x": torch.ones(())}, ValueError, "x is a scalar"),
]


def test_bad_routes() -> None:
    for changes, error, message in BAD_ROUTES:
        with pytest.raises(error, match=message):
            route(**{"x": torch.ones(6, 5), "router_weight": torch.ones(4, 5), "num_active": 2, **changes})
