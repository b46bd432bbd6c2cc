"""Product keys and sparse gradients: every implementation against the definition, in outputs and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.memory_cases import assert_all_close, lowest_indices, tolerance
from torch import Tensor

from sparsepeft.ops import explain, load_balancing_loss, memory_read, product_load_balancing_loss, product_memory_read
from sparsepeft.ops.numerics import top_k_lowest_index
from sparsepeft.ops.product_memory import memory_read_sparsely, step_of_rows
from sparsepeft.ops.product_memory.cpu import select_pairs_cpu, update_rows_cpu
from sparsepeft.ops.product_memory.search import select_pairs
from sparsepeft.ops.product_memory.update import AdamStep, Rows, update_rows

NAMES = ("x", "first_keys", "second_keys", "child_keys", "child_values")
# (leading dimensions of x), D, n, C, K; P = n * n.
SHAPES = {
    "paper-like": ((3, 7), 24, 4, 3, 8),
    "odd width": ((2, 5), 13, 3, 3, 4),
    "a single vector": ((), 9, 3, 2, 2),
    "more kept than halves": ((4, 3), 12, 3, 2, 7),
    "all parents": ((4, 3), 12, 2, 5, 4),
    "one selected": ((5, 3), 12, 4, 1, 1),
    "one of each": ((2, 2), 3, 1, 1, 1),
    "no tokens": ((0, 4), 8, 3, 2, 3),
    "many parents": ((4, 9), 16, 35, 3, 5),
    "many tokens of a parent": ((300,), 6, 2, 9, 2),
    "wide": ((3, 5), 768 + 16 + 5, 5, 4, 8),  # every width of the kernels' loops
}


def make_inputs(shape: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    lead, hidden, n, children, _ = SHAPES[shape]
    tables = [(n, hidden - hidden // 2), (n, hidden // 2), (n * n, children, hidden), (n * n, children, hidden)]
    scales = (hidden**-0.5, hidden**-0.5, hidden**-0.5, 1.0)  # scores of unit size
    inputs = [torch.randn(*lead, hidden, dtype=torch.float64)]
    inputs += [torch.randn(*table, dtype=torch.float64) * scale for table, scale in zip(tables, scales, strict=True)]
    return [tensor.to(dtype) for tensor in inputs]


def run(
    inputs: list[Tensor], grad_output: Tensor, read: Any = product_memory_read, **options: Any
) -> dict[str, Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = read(*leaves, **options)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return {"output": output.detach(), **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), [("torch", torch.float64), ("cpu", torch.float32)])
def test_matches_reference(shape: str, impl: str, dtype: torch.dtype) -> None:
    inputs, top_k = make_inputs(shape, dtype), SHAPES[shape][-1]
    grad_output = torch.randn_like(inputs[0])
    options = {"top_k": top_k, "temperature": 1.6}
    expected = run(inputs, grad_output, **options, impl="reference")
    assert_all_close(run(inputs, grad_output, **options, impl=impl), expected, **tolerance(dtype))
    found = run(inputs, grad_output, **options, impl=impl, sparse_gradients=True)
    assert all(found[name].is_sparse and found[name].is_coalesced() for name in NAMES[3:])
    read = expected["child_values"].flatten(1).abs().amax(1) > 0
    assert found["child_values"].indices()[0].tolist() == read.nonzero()[:, 0].tolist()  # the parents read, no others
    assert_all_close({name: tensor.to_dense() for name, tensor in found.items()}, expected, **tolerance(dtype))
    with torch.no_grad():
        assert torch.equal(product_memory_read(*inputs, **options, impl=impl), found["output"])


def test_threads_change_nothing() -> None:
    inputs, found, before = make_inputs("many parents", torch.float32), [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run(inputs, torch.ones_like(inputs[0]), top_k=5, impl="cpu"))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("output", "child_keys", "child_values"))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl: str) -> None:
    inputs = make_inputs("odd width")
    scores = torch.cat([inputs[1].repeat_interleave(3, 0), inputs[2].repeat(3, 1)], -1) @ inputs[0].flatten(0, 1).T
    ordered = scores.sort(0, descending=True).values
    assert (ordered[3] - ordered[4]).min() > 1e-3  # away from ties: no selection flips
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *t: product_memory_read(*t, top_k=4, temperature=0.7, impl=impl), leaves)


@pytest.mark.parametrize("select", [select_pairs, select_pairs_cpu])
@pytest.mark.parametrize(("n", "top_k"), [(1, 1), (3, 2), (3, 8), (3, 9), (40, 1), (40, 6), (40, 100)])
def test_the_best_pairs_are_the_best_of_all_and_of_equal_ones_the_lowest(select: Any, n: int, top_k: int) -> None:
    first, second = (torch.randint(-3, 4, (30, n)).float() for _ in range(2))  # whole numbers: equal sums are equal
    every = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(1)
    assert select(first, second, top_k).sort(-1).values.tolist() == lowest_indices(every, top_k)


def test_nan_in_nan_out() -> None:
    inputs = make_inputs("many parents", torch.float32)
    inputs[0][0, 0, 0] = torch.nan
    for impl in ("torch", "cpu"):
        output = product_memory_read(*inputs, top_k=5, impl=impl)
        assert output[0, 0].isnan().all()
        assert not output[1:].isnan().any()


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_half_precision_and_autocast(impl: str) -> None:
    """A float32 memory keeps its precision; with all parents kept, rounded scores do not change what is selected."""
    wide = make_inputs("all parents", torch.float32)
    half = [tensor.bfloat16() for tensor in wide]
    expected = product_memory_read(half[0].float(), *wide[1:], top_k=4, impl="reference").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = product_memory_read(half[0], *wide[1:], top_k=4, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=8e-3, atol=1e-5)  # a rounding of the output
    if impl == "torch":
        grad_output = torch.randn_like(half[0])
        exact = run([t.float() for t in half], grad_output.float(), top_k=4, impl="reference")
        reference, found = (run(half, grad_output, top_k=4, impl=each) for each in ("reference", "torch"))
        for name, value in exact.items():
            assert found[name].dtype == torch.bfloat16
            error, allowed = ((r[name].float() - value).abs().max() for r in (found, reference))
            assert error <= max(2 * allowed, torch.finfo(torch.bfloat16).eps * value.abs().max()), name
    for tensor in half[3:]:
        tensor.zero_()
    assert torch.equal(product_memory_read(half[0], *half[1:], top_k=3), half[0])


def test_only_what_requires_a_gradient_gets_one() -> None:
    inputs = make_inputs("paper-like", torch.float32)
    for impl in ("torch", "cpu"):
        for index, name in enumerate(NAMES):
            leaves = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(inputs)]
            expected, actual = (
                torch.autograd.grad(product_memory_read(*leaves, top_k=8, impl=each).sum(), leaves[index])[0]
                for each in ("reference", impl)
            )
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("impl", "dtype"), [("torch", torch.float64), ("cpu", torch.float32)])
def test_keys_of_their_own_have_sparse_gradients_too(impl: str, dtype: torch.dtype) -> None:
    x, _, _, child_keys, child_values = make_inputs("many parents", dtype)
    inputs = [x, torch.randn(len(child_keys), x.shape[-1], dtype=dtype) / 4, child_keys, child_values]

    def gradients(read: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = read(*leaves)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    expected = gradients(lambda *tensors: memory_read(*tensors, top_k=5, temperature=1.6))
    actual = gradients(lambda *tensors: memory_read_sparsely(*tensors, 5, 1.6, impl))
    assert [tensor.is_sparse for tensor in actual] == [False, False, True, True, True]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.to_dense(), want, rtol=2e-5, atol=2e-5)


def test_the_loss_of_halves_is_that_of_the_marginals() -> None:
    x, first, second, *_ = make_inputs("many parents", torch.float32)
    n, top_k = len(first), 5
    parent_keys = torch.cat([first.repeat_interleave(n, 0), second.repeat(n, 1)], -1)
    mask = torch.ones(4, 9)
    mask[1, 3:] = 0
    scores = x[mask.bool()] @ parent_keys.T
    chosen = torch.zeros_like(scores).scatter(1, top_k_lowest_index(scores, top_k)[1], 1 / top_k).mean(0).view(n, n)
    probabilities = scores.softmax(-1).mean(0).view(n, n)
    losses = [n * (chosen.sum(dim) * probabilities.sum(dim)).sum() for dim in (1, 0)]
    found = product_load_balancing_loss(x, first, second, top_k=top_k, mask=mask)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    assert product_load_balancing_loss(x, first, second, top_k=top_k, mask=torch.zeros(4, 9)) == 0
    even = product_load_balancing_loss(x, first * 0, second * 0, top_k=top_k)
    assert even == pytest.approx(1)  # ties are one-sided, but nothing prefers them
    leaves = first.clone().requires_grad_(), second.clone().requires_grad_()
    product_load_balancing_loss(x, *leaves, top_k=top_k).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert load_balancing_loss(x, parent_keys, top_k=top_k) > 0


@pytest.mark.parametrize("width", [(3, 5), (64,)])
def test_the_compiled_step_of_rows_is_the_plain_one(width: tuple[int, ...]) -> None:
    rows, slots = torch.tensor([7, 0, 4]), torch.tensor([1, 0, 2])
    table, first, second = torch.randn(9, *width), torch.randn(4, *width), torch.rand(4, *width)
    step = AdamStep(decay=0.99, beta1=0.8, beta2=0.9, step_size=0.1, root=0.7, eps=1e-6)
    gradient, found, version = torch.randn(3, *width), [], table._version
    for update in (update_rows, step_of_rows, update_rows_cpu):
        tensors = [tensor.clone() for tensor in (table, first, second)]
        update(Rows(rows, slots, gradient, *tensors), step)
        found.append(tensors)
        assert tensors[0]._version > version
    for expected, *others in zip(*found, strict=True):
        for actual in others:
            torch.testing.assert_close(actual, expected)
    assert torch.equal(found[2][0][[1, 2, 3, 5, 6, 8]], table[[1, 2, 3, 5, 6, 8]])
    assert torch.equal(found[2][1][3], first[3])


# Tracing


class Reader(torch.nn.Module):
    def __init__(self, memory: list[Tensor], top_k: int) -> None:
        super().__init__()
        self.memory, self.top_k = torch.nn.ParameterList(memory), top_k

    def forward(self, x: Tensor) -> Tensor:
        return product_memory_read(x, *self.memory, top_k=self.top_k)


def test_exports_with_any_number_of_tokens_and_settles_ties_as_eager_does() -> None:
    (x, *memory), top_k = make_inputs("many parents", torch.float32), 5
    memory[0][7], memory[1][9] = memory[0][3], memory[1][2]
    reader = Reader(memory, top_k).eval().requires_grad_(False)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(reader, (x,), dynamic_shapes={"x": {1: tokens}})
    operators = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("sparsepeft" in name for name in operators)  # other runtimes must understand the graph
    for length in (2, 31):
        x = torch.randn(x.shape[0], length, x.shape[2])
        torch.testing.assert_close(exported.module()(x), reader(x), rtol=1e-5, atol=2e-6)


def test_compiles_around_what_has_gradients() -> None:
    torch.compiler.reset()
    inputs, grad_output = make_inputs("odd width"), torch.randn(2, 5, 13, dtype=torch.float64)
    compiled = torch.compile(lambda *t: product_memory_read(*t, top_k=4), backend="aot_eager")
    expected = run(inputs, grad_output, top_k=4, impl="reference")
    assert_all_close(run(inputs, grad_output, read=compiled), expected, rtol=1e-11, atol=1e-12)


# The choice, and errors


def test_the_compiled_kernels_are_taken_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("odd width", torch.float32)
    monkeypatch.setattr("sparsepeft.ops.product_memory.is_proven", lambda: True)
    assert explain(product_memory_read, *inputs, top_k=4).impl == "cpu"
    assert "float32" in explain(product_memory_read, *make_inputs("odd width"), top_k=4).others["cpu"]
    monkeypatch.setattr("sparsepeft.ops.product_memory.is_proven", lambda: False)
    assert "like this one" in explain(product_memory_read, *inputs, top_k=4).others["cpu"]
    with pytest.raises(ValueError, match="plain tensors on a CPU"):
        torch.func.vmap(lambda x: product_memory_read(x, *inputs[1:], top_k=4, impl="cpu"))(inputs[0])


BAD_ARGUMENTS = [
    ({"top_k": 10}, ValueError, "top_k is 10, but the memory has 9 parents"),
    ({"first_keys": torch.ones(4, 7)}, ValueError, r"first_keys has shape \(4, 7\), second_keys \(3, 6\); expected"),
    ({"first_keys": torch.ones(3, 7, 1)}, ValueError, "a table for each half"),
    ({"second_keys": torch.ones(3, 6).long()}, TypeError, "second_keys has dtype torch.int64"),
    ({"second_keys": torch.ones(3, 6, device="meta")}, ValueError, "second_keys on meta: move them to one"),
    ({"second_keys": torch.ones(3, 7)}, ValueError, "last dimensions differ"),
    ({"child_keys": torch.ones(8, 3, 13)}, ValueError, "child_keys is for 8 parents, parent_keys for 9"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    ({"impl": "triton"}, ValueError, "impl is 'triton'; expected one of auto, cpu, torch, reference"),
    ({"impl": "reference", "sparse_gradients": True}, ValueError, "has no sparse gradients: use impl='auto'"),
]


def test_bad_arguments() -> None:
    inputs = dict(zip(NAMES, make_inputs("odd width", torch.float32), strict=True))
    for changes, error, message in BAD_ARGUMENTS:
        with pytest.raises(error, match=message):
            product_memory_read(**{**inputs, "top_k": 4, **changes})
    half = {name: tensor.bfloat16().requires_grad_() for name, tensor in inputs.items()} | {"x": inputs["x"]}
    with pytest.raises(ValueError, match=r"memory of torch.bfloat16 and states of torch.float32.*give the memory that"):
        product_memory_read(**half, top_k=4, sparse_gradients=True)
    assert product_memory_read(**half, top_k=4).dtype == torch.float32
