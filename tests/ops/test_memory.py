"""memory_read: every implementation against the reference, in outputs and in every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from sparsepeft.ops import explain_memory_impl, memory_read
from sparsepeft.ops.memory.pairs import TILE_SLOTS, plan_tiles
from sparsepeft.ops.memory.select import top_k_lowest_index

FAST = ("masked", "selected")
ALL = ("reference", *FAST)
NAMES = ("x", "parent_keys", "child_keys", "child_values")

# (leading dimensions of x), D, P, C, K. Odd on purpose; each line names what it adds.
SHAPES = {
    "paper-like": ((3, 7), 24, 16, 3, 8),
    "odd": ((2, 5), 13, 7, 3, 4),
    "no batch dimension": ((11,), 9, 5, 2, 2),
    "a single vector": ((), 9, 5, 2, 2),
    "three leading dimensions": ((2, 3, 2), 10, 6, 1, 3),
    "all parents": ((4, 3), 12, 6, 3, 6),
    "one selected": ((5, 3), 12, 6, 3, 1),
    "one parent": ((5, 3), 12, 1, 4, 1),
    "one child": ((5, 3), 12, 9, 1, 3),
    "one of each": ((2, 2), 3, 1, 1, 1),
    "one token": ((1, 1), 17, 40, 5, 6),
    "no tokens": ((0, 4), 8, 5, 2, 3),
    "no tokens, many parents": ((2, 0), 8, 50, 2, 3),
    "many parents": ((4, 9), 16, 131, 3, 5),  # beyond the stable sort: top-k and a check for ties
    "sparse use of many parents": ((3,), 16, 700, 2, 2),  # tiles of parents that are no neighbours
    "many tokens per parent": ((TILE_SLOTS + 77,), 4, 3, 2, 2),  # a parent spans several tiles
}


def make_inputs(
    shape: str, dtype: torch.dtype = torch.float64, memory_dtype: torch.dtype | None = None
) -> list[Tensor]:
    lead, hidden, parents, children, _ = SHAPES[shape]
    memory_dtype = memory_dtype or dtype
    return [
        torch.randn(*lead, hidden).to(dtype),
        # Scores of unit size: softmaxes neither flat nor one-hot.
        (torch.randn(parents, hidden) / hidden**0.5).to(memory_dtype),
        (torch.randn(parents, children, hidden) / hidden**0.5).to(memory_dtype),
        torch.randn(parents, children, hidden).to(memory_dtype),
    ]


def run(inputs: list[Tensor], grad_output: Tensor, **options: object) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = memory_read(*leaves, **options)
    output.backward(grad_output)
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    for name in expected:
        # NaN never matches, a tensor's size scales its tolerance: gradients sum over tokens, outputs do not.
        scale = expected[name].abs().amax().item() if expected[name].numel() else 1.0
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=rtol,
            atol=atol * max(scale, 1.0),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape: str, impl: str) -> None:
    inputs, top_k = make_inputs(shape), SHAPES[shape][-1]
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=top_k, temperature=1.6, impl="reference")
    actual = run(inputs, grad_output, top_k=top_k, temperature=1.6, impl=impl)
    assert actual["output"].shape == inputs[0].shape
    # float64: only the order of summation differs.
    assert_all_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", ["paper-like", "many parents", "sparse use of many parents"])
def test_matches_reference_float32(shape: str, impl: str) -> None:
    inputs, top_k = make_inputs(shape, torch.float32), SHAPES[shape][-1]
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=top_k, impl="reference")
    actual = run(inputs, grad_output, top_k=top_k, impl=impl)
    # A few units of float32 rounding (6e-8) through two products and two softmaxes.
    assert_all_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FAST)
def test_half_precision_is_as_close_to_float32_as_the_reference(impl: str, dtype: torch.dtype) -> None:
    # K = P: rounded scores must not change what is selected, only how exactly it is computed.
    inputs = make_inputs("all parents", dtype)
    grad_output = torch.randn_like(inputs[0])
    exact = run([tensor.float() for tensor in inputs], grad_output.float(), top_k=6, impl="reference")
    reference = run(inputs, grad_output, top_k=6, impl="reference")
    actual = run(inputs, grad_output, top_k=6, impl=impl)
    for name, value in exact.items():
        assert actual[name].dtype == dtype
        error, allowed = ((r[name].float() - value).abs().max() for r in (actual, reference))
        # Twice the plain code's error, or one rounding of the largest entry where the plain code is lucky.
        assert error <= max(2 * allowed, torch.finfo(dtype).eps * value.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FAST)
def test_half_precision_selects_among_the_best(impl: str, dtype: torch.dtype) -> None:
    # Two implementations may round a near tie differently, so not the indices but the scores of what was selected are
    # compared: with K=1 and the values one-hot, the output names the parent.
    parents = hidden = 24
    x, parent_keys = torch.randn(50, hidden).to(dtype), (torch.randn(parents, hidden) / hidden**0.5).to(dtype)
    child_values = torch.eye(parents).unsqueeze(1).mul(1e3).to(dtype)
    read = memory_read(x, parent_keys, torch.zeros_like(child_values), child_values, top_k=1, impl=impl)
    chosen = read.float().argmax(-1, keepdim=True)
    scores = x.float() @ parent_keys.float().T
    shortfall = scores.amax(-1, keepdim=True) - scores.gather(-1, chosen)
    assert shortfall.max() <= 2 * torch.finfo(dtype).eps * scores.abs().max()  # both scores off by a rounding


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_memory_keeps_its_precision_on_half_precision_input(dtype: torch.dtype, impl: str) -> None:
    inputs, top_k = make_inputs("paper-like", dtype, memory_dtype=torch.float32), 8
    grad_output = torch.randn_like(inputs[0])
    actual = run(inputs, grad_output, top_k=top_k, impl=impl)
    upcast = run([tensor.float() for tensor in inputs], grad_output.float(), top_k=top_k, impl=impl)
    for name in ("output", "x"):
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], upcast[name].to(dtype))
    for name in NAMES[1:]:
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], upcast[name])


@pytest.mark.parametrize("impl", ALL)
def test_autocast_changes_nothing(impl: str) -> None:
    inputs = make_inputs("paper-like", torch.float32)
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=8, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = memory_read(*inputs, top_k=8, impl=impl)
    assert torch.equal(output, expected["output"])

    class Wrapped(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return memory_read(*tensors, top_k=8, impl=impl)

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    Wrapped()(*leaves).backward(grad_output)
    assert_all_close(
        {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)},
        {name: expected[name] for name in NAMES},
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_dtype", [torch.float32, None])
def test_zero_values_leave_the_input_exactly(impl: str, dtype: torch.dtype, memory_dtype: torch.dtype | None) -> None:
    for shape in ("paper-like", "many parents"):
        x, parent_keys, child_keys, child_values = make_inputs(shape, dtype, memory_dtype)
        output = memory_read(
            x, parent_keys, child_keys, torch.zeros_like(child_values), top_k=SHAPES[shape][-1], impl=impl
        )
        assert output.dtype == x.dtype
        assert torch.equal(output, x)
        assert output.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck(impl: str) -> None:
    lead, hidden, parents, children, top_k = (2, 3), 5, 4, 3, 2
    x = torch.randn(*lead, hidden, dtype=torch.float64)
    parent_keys = torch.randn(parents, hidden, dtype=torch.float64)
    scores = (x @ parent_keys.T).sort(-1, descending=True).values
    assert (scores[..., top_k - 1] - scores[..., top_k]).min() > 1e-3  # away from ties: no selection flips
    memory = [torch.randn(parents, children, hidden, dtype=torch.float64) for _ in range(2)]
    leaves = [tensor.requires_grad_() for tensor in (x, parent_keys, *memory)]
    assert torch.autograd.gradcheck(lambda *t: memory_read(*t, top_k=top_k, temperature=0.7, impl=impl), leaves)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("needed", [(0,), (1, 2, 3), (2,), (0, 3)])
def test_gradients_only_where_required(impl: str, needed: tuple[int, ...]) -> None:
    inputs = make_inputs("odd")
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=4, impl="reference")
    for index in needed:
        inputs[index].requires_grad_()
    memory_read(*inputs, top_k=4, impl=impl).backward(grad_output)
    for index, (name, tensor) in enumerate(zip(NAMES, inputs, strict=True)):
        if index in needed:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-11, atol=1e-12)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("impl", FAST)
def test_non_contiguous_inputs(impl: str) -> None:
    x, parent_keys, child_keys, child_values = make_inputs("paper-like")
    x = x.transpose(0, 1)
    child_keys, child_values = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (child_keys, child_values))
    parent_keys = parent_keys.T.contiguous().T
    grad_output = torch.randn(1, 1, 1, dtype=x.dtype).expand_as(x)  # as from a sum
    inputs = [x, parent_keys, child_keys, child_values]
    expected = run([tensor.contiguous() for tensor in inputs], grad_output.contiguous(), top_k=8, impl="reference")
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]  # run() would make them contiguous
    output = memory_read(*leaves, top_k=8, impl=impl)
    output.backward(grad_output)
    actual = {"output": output.detach(), **{n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True)}}
    assert_all_close(actual, expected, rtol=1e-11, atol=1e-12)


# Ties. Small integers make every score exact, whatever the order of summation.


def naive_lowest_index(scores: Tensor, top_k: int) -> list[list[int]]:
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]) for row in scores.tolist()]


@pytest.mark.parametrize("num_columns", [16, 33, 100])
@pytest.mark.parametrize("top_k", [1, 5, 15])
def test_top_k_lowest_index(num_columns: int, top_k: int) -> None:
    scores = torch.randint(-3, 4, (200, num_columns)).double()
    scores[::4] = torch.randn(50, num_columns).double()  # rows without ties between them
    scores[1] = 2.0
    expected = naive_lowest_index(scores, top_k)
    torch.compiler.reset()
    compiled = torch.compile(top_k_lowest_index, fullgraph=True, backend="eager")  # settles ties without looking
    for function in (top_k_lowest_index, compiled):
        values, indices = function(scores, top_k)
        assert indices.sort(-1).values.tolist() == expected
        assert torch.equal(values, scores.gather(-1, indices))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("num_parents", [16, 60])
def test_ties_keep_the_lowest_parent(impl: str, num_parents: int) -> None:
    hidden, top_k = 8, 5
    x = torch.randint(-1, 2, (40, hidden)).float()
    parent_keys = torch.randint(-1, 2, (num_parents, hidden)).float()
    parent_keys[3::4] = parent_keys[2]  # ties at the K-th place too, and a row of zeros ties everywhere
    x[0] = 0
    child_keys = torch.zeros(num_parents, 1, hidden)
    child_values = torch.randn(num_parents, 1, hidden)
    scores = x @ parent_keys.T
    selected = torch.tensor(naive_lowest_index(scores, top_k))
    gate = torch.softmax(scores.gather(-1, selected), -1)
    expected = x + torch.einsum("nk,nkd->nd", gate, child_values[selected, 0])
    leaves = [t.requires_grad_() for t in (x, parent_keys, child_keys, child_values)]
    output = memory_read(*leaves, top_k=top_k, impl=impl)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    unused = torch.ones(num_parents, dtype=torch.bool)
    unused[selected.flatten()] = False
    assert not child_values.grad[unused].any()
    # The reference divides the selected gates by their sum, which cancels the others only up to rounding.
    torch.testing.assert_close(parent_keys.grad[unused], torch.zeros(int(unused.sum()), hidden), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", ["paper-like", "many parents"])
def test_nan_in_nan_out(impl: str, shape: str) -> None:
    inputs, top_k = make_inputs(shape), SHAPES[shape][-1]
    clean = memory_read(*inputs, top_k=top_k, impl="reference")
    inputs[0][1, 2, 0] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = memory_read(*leaves, top_k=top_k, impl=impl)
    output.sum().backward()
    assert output[1, 2].isnan().all()
    others = torch.ones(output.shape[:2], dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(output[others], clean[others])


# Tracing


@pytest.mark.parametrize("impl", ["auto", *FAST])
@pytest.mark.parametrize("shape", ["paper-like", "many parents"])
def test_compiles_to_one_graph(impl: str, shape: str) -> None:
    torch.compiler.reset()  # each case compiles anew; recompilations of one function are limited
    inputs, top_k = make_inputs(shape), SHAPES[shape][-1]

    def step(*tensors: Tensor) -> Tensor:
        return memory_read(*tensors, top_k=top_k, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = run(inputs, torch.ones_like(inputs[0]), top_k=top_k, impl="reference")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = compiled(*leaves)
    output.backward(torch.ones_like(output))
    actual = {"output": output.detach(), **{n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True)}}
    assert_all_close(actual, expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        shorter = inputs[0][:, :2]
        torch.testing.assert_close(compiled(shorter, *inputs[1:]), step(shorter, *inputs[1:]))


@pytest.mark.slow  # the inductor backend calls a C++ compiler
@pytest.mark.parametrize("impl", FAST)
def test_inductor_matches_reference(impl: str) -> None:
    torch.compiler.reset()
    inputs = make_inputs("many parents", torch.float32)
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=5, impl="reference")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = torch.compile(lambda *t: memory_read(*t, top_k=5, impl=impl), fullgraph=True)(*leaves)
    output.backward(grad_output)
    actual = {"output": output.detach(), **{n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True)}}
    assert_all_close(actual, expected, rtol=1e-5, atol=2e-6)


class Reader(torch.nn.Module):
    def __init__(self, memory: list[Tensor], top_k: int, impl: str) -> None:
        super().__init__()
        self.memory = torch.nn.ParameterList(memory)
        self.top_k, self.impl = top_k, impl

    def forward(self, x: Tensor) -> Tensor:
        return memory_read(x, *self.memory, top_k=self.top_k, impl=self.impl)


@pytest.mark.parametrize("impl", ["auto", *ALL])
@pytest.mark.parametrize("shape", ["paper-like", "many parents"])
def test_exports_with_any_number_of_tokens(impl: str, shape: str) -> None:
    (x, *memory), top_k = make_inputs(shape, torch.float32), SHAPES[shape][-1]
    reader = Reader(memory, top_k, impl).eval()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(reader, (x,), dynamic_shapes={"x": {1: tokens}})
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("sparsepeft" in name for name in operators)  # other runtimes must understand the graph
    for length in (2, 7, 31):
        x = torch.randn(x.shape[0], length, x.shape[2])
        torch.testing.assert_close(exported.module()(x), reader(x), rtol=1e-5, atol=2e-6)


def test_export_settles_ties_as_eager_does() -> None:
    parent_keys = torch.zeros(40, 4)
    memory = [parent_keys, torch.zeros(40, 1, 4), torch.randn(40, 1, 4)]
    x = torch.randn(3, 4)
    for impl in FAST:
        reader = Reader(memory, 3, impl)
        exported = torch.export.export(reader, (x,)).module()
        torch.testing.assert_close(exported(x), x + memory[2][:3, 0].mean(0))


def test_selected_operator_is_registered_soundly() -> None:
    for flags in itertools.product((False, True), repeat=2):
        inputs = make_inputs("odd")
        inputs[0] = inputs[0].flatten(0, 1).requires_grad_(flags[0])
        for tensor in inputs[1:]:
            tensor.requires_grad_(flags[1])
        torch.library.opcheck(torch.ops.sparsepeft.memory_read_selected.default, (*inputs, 4, 1.5))


# The plan of tiles and the choice


@pytest.mark.parametrize(
    "counts",
    [
        [0],
        [0, 0, 5],
        [1] * 300,
        [TILE_SLOTS * 2 + 3, 0, 1],
        [400, 1] * 20,
        [0, 3, 0, 0, 0, 900, 2, 0],
        [1, *[0] * 999] * 5,
    ],
)
@pytest.mark.parametrize("max_scattered", [1, 64])
def test_tiles_cover_every_pair_once(counts: list[int], max_scattered: int) -> None:
    covered = [0] * len(counts)
    for tile in plan_tiles(counts, max_scattered):
        parents = range(tile.parents.start, tile.parents.stop) if isinstance(tile.parents, slice) else tile.parents
        assert len(parents) * tile.slots <= TILE_SLOTS
        for parent in parents:
            assert covered[parent] == tile.skip or not counts[parent]
            covered[parent] += min(tile.slots, counts[parent] - tile.skip)
    assert covered == counts


def test_choice_follows_the_memory_and_says_why() -> None:
    small = explain_memory_impl(num_parents=16, num_children=3, top_k=8)
    assert small.impl == "masked"
    assert "96" in small.reason  # 2 P C
    large = explain_memory_impl(num_parents=4096, num_children=32, top_k=8)
    assert large.impl == "selected"
    assert "P=4096" in large.reason
    # All parents selected: there is nothing to save.
    assert explain_memory_impl(num_parents=64, num_children=32, top_k=64).impl == "masked"
    # An exported graph has to gather, so it stays dense for longer.
    assert explain_memory_impl(num_parents=64, num_children=32, top_k=8).impl == "selected"
    assert explain_memory_impl(num_parents=64, num_children=32, top_k=8, exporting=True).impl == "masked"


def test_auto_runs_what_explain_names() -> None:
    for shape, inference in itertools.product(("paper-like", "many parents"), (False, True)):
        inputs, (_, _, parents, children, top_k) = make_inputs(shape, torch.float32), SHAPES[shape]
        inputs[0].requires_grad_(not inference)
        sizes = {"num_tokens": inputs[0].shape[:-1].numel(), "hidden_size": inputs[0].shape[-1]}
        choice = explain_memory_impl(
            num_parents=parents, num_children=children, top_k=top_k, inference=inference, **sizes
        )
        assert ("measured" in choice.reason and "cpu" in choice.reason) == inference
        assert torch.equal(memory_read(*inputs, top_k=top_k), memory_read(*inputs, top_k=top_k, impl=choice.impl))


# The compiled form, which has no gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, "wide"])
def test_compiled_form_matches_reference(shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "wide", ((3, 5), 768 + 16 + 5, 16, 3, 8))  # every width of its loops
    inputs, top_k = make_inputs(shape, dtype, memory_dtype=torch.float32), SHAPES[shape][-1]
    expected = memory_read(*inputs, top_k=top_k, temperature=1.6, impl="reference")
    actual = memory_read(*inputs, top_k=top_k, temperature=1.6, impl="cpu")
    assert actual.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # a rounding of the output
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 2)


def test_compiled_form_takes_given_scores_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens, whose parents are scored by one matrix product; transposed and strided tensors."""
    x, *memory = make_inputs("paper-like", torch.float32)
    x = torch.randn(24, 2 * 900)[:, ::2].t()
    memory = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in memory]
    for many, top_k in itertools.product((0, 1 << 40), (5, 8)):  # alone and, with half of the parents, a few at once
        monkeypatch.setattr("sparsepeft.ops.memory.compiled._MANY_SCORES", many)
        expected = memory_read(x, *memory, top_k=top_k, impl="reference")
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                actual = memory_read(x, *memory, top_k=top_k, impl="cpu")
            finally:
                torch.set_num_threads(before)
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("top_k", [3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_form_answers_a_token_alike_whatever_its_neighbours(top_k: int, dtype: torch.dtype) -> None:
    x, memory = torch.randn(11, 768).to(dtype), [torch.randn(16, 768), torch.randn(16, 3, 768), torch.randn(16, 3, 768)]
    together = memory_read(x, *memory, top_k=top_k, impl="cpu")
    for token in range(len(x)):
        assert torch.equal(memory_read(x[token : token + 1], *memory, top_k=top_k, impl="cpu")[0], together[token])


def test_compiled_form_keeps_the_lowest_of_equal_parents_and_takes_nan_for_the_largest() -> None:
    # Every score three times, of whole numbers: exactly equal however a matrix product sums them up.
    x, parents = torch.randint(-4, 5, (9, 24)).float(), torch.randint(-4, 5, (6, 24)).float().repeat(3, 1)
    children = torch.randn(18, 3, 24), torch.randn(18, 3, 24)
    for top_k in range(1, 19):
        expected = memory_read(x, parents, *children, top_k=top_k, impl="reference")
        actual = memory_read(x, parents, *children, top_k=top_k, impl="cpu")
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=4e-6)
    parents[4] = torch.nan
    poisoned = memory_read(x, parents, *children, top_k=2, impl="cpu")
    assert poisoned.isnan().all()


def test_values_of_zero_leave_the_states_as_they_are_in_the_compiled_form() -> None:
    x, parent_keys, child_keys, child_values = make_inputs("odd", torch.float32)
    assert torch.equal(memory_read(x, parent_keys, child_keys, child_values * 0, top_k=4, impl="cpu"), x)


def test_compiled_form_rounds_bfloat16_as_pytorch_does() -> None:
    x, *memory = make_inputs("odd", torch.bfloat16, memory_dtype=torch.float32)
    zeros = [*memory[:2], torch.zeros_like(memory[2])]
    assert torch.equal(memory_read(x, *zeros, top_k=4, impl="cpu"), x)
    memory[2][:, :, :5] *= torch.tensor([1e-41, 1e30, 1e38, 1e39, 1e-3])  # subnormal numbers, too large ones
    wide = memory_read(x.float(), *memory, top_k=4, impl="cpu")
    torch.testing.assert_close(
        memory_read(x, *memory, top_k=4, impl="cpu"), wide.bfloat16(), rtol=0, atol=0, equal_nan=True
    )


def test_compiled_form_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("odd", torch.float32)
    with pytest.raises(ValueError, match=r"impl is 'cpu', but hidden states and memory are torch\.float64"):
        memory_read(*make_inputs("odd"), top_k=4, impl="cpu")
    inputs[2].requires_grad_()
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        memory_read(*inputs, top_k=4, impl="cpu")
    with torch.no_grad():
        compiled = memory_read(*inputs, top_k=4, impl="cpu")
        monkeypatch.setattr("sparsepeft.ops.memory.choice.why_not_built", lambda: "no C++ compiler was found.")
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found"):
            memory_read(*inputs, top_k=4, impl="cpu")
        torch.testing.assert_close(memory_read(*inputs, top_k=4), compiled)


@pytest.mark.parametrize("wide", NAMES[1:])
def test_a_wider_tensor_of_the_memory_is_not_read_as_float32(wide: str) -> None:
    inputs = dict(zip(NAMES, make_inputs("odd", torch.float32), strict=True))
    expected = memory_read(*inputs.values(), top_k=4, impl="reference")
    inputs[wide] = inputs[wide].double()
    torch.testing.assert_close(memory_read(**inputs, top_k=4), expected, rtol=1e-5, atol=1e-6)
    inputs[wide] = inputs[wide].to("meta", torch.float32)
    with pytest.raises(ValueError, match=f"different devices.*{wide} on meta.*move them to one"):
        memory_read(**inputs, top_k=4)


@pytest.mark.parametrize("trained", NAMES)
def test_whichever_tensor_is_trained_gets_its_gradient(trained: str) -> None:
    inputs = dict(zip(NAMES, make_inputs("odd", torch.float32), strict=True))
    leaf = inputs[trained].requires_grad_()
    memory_read(**inputs, top_k=4).sum().backward()
    actual, leaf.grad = leaf.grad, None
    memory_read(**inputs, top_k=4, impl="reference").sum().backward()
    torch.testing.assert_close(actual, leaf.grad, rtol=1e-4, atol=1e-5)


def test_tensors_without_memory_of_their_own_are_not_read_by_compiled_code() -> None:
    inputs = make_inputs("odd", torch.float32)
    expected = memory_read(*inputs, top_k=4, impl="reference")
    rows = torch.func.vmap(lambda x: memory_read(x, *inputs[1:], top_k=4))(inputs[0])
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        assert forward_ad.unpack_dual(memory_read(dual, *inputs[1:], top_k=4)).tangent is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        assert memory_read(*fake, top_k=4).shape == expected.shape


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k is 0, but the memory has 7 parents"),
        ({"top_k": 8}, ValueError, "top_k is 8, but the memory has 7 parents"),
        ({"top_k": 2.0}, TypeError, "top_k is 2.0; expected an int"),
        ({"top_k": True}, TypeError, "top_k is True; expected an int"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"impl": "dense"}, ValueError, "impl is 'dense'; expected one of auto, reference, masked, selected, cpu"),
        ({"x": torch.ones(2, 5, 13, dtype=torch.long)}, TypeError, "x has dtype torch.int64; expected a floating"),
        ({"x": torch.ones(())}, ValueError, "x is a scalar"),
        ({"x": torch.ones(2, 5, 12)}, ValueError, r"last dimensions differ \(x 12, parent_keys 13"),
        ({"parent_keys": torch.ones(1, 7, 13)}, ValueError, r"parent_keys has shape \(1, 7, 13\); expected \(P, D\)"),
        ({"child_keys": torch.ones(21, 13)}, ValueError, r"child_keys has shape \(21, 13\); expected \(P, C, D\)"),
        ({"child_keys": torch.ones(6, 3, 13)}, ValueError, "child_keys is for 6 parents, parent_keys for 7"),
        ({"child_values": torch.ones(7, 2, 13)}, ValueError, "child_keys has 3 children per parent, child_values 2"),
        (
            {"child_keys": torch.ones(7, 0, 13), "child_values": torch.ones(7, 0, 13)},
            ValueError,
            "expected at least one child",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = dict(zip(NAMES, make_inputs("odd", torch.float32), strict=True))
    arguments |= {"top_k": 4, **changes}
    with pytest.raises(error, match=message):
        memory_read(**arguments)
