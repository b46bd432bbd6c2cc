"""The fused memory without a GPU: in Triton's interpreter against the reference, and assembled for two GPUs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.ops import memory_cases as cases
from tests.ops.triton_aot import CAPABILITIES, assert_assembles, interpreted, needs_triton
from torch import Tensor
from torch._subclasses import FakeTensorMode

from sparsepeft.ops import explain, gpu, memory_read, memory_read_mixed, registry

HALF = [torch.bfloat16, torch.float16]


@needs_triton
@pytest.mark.parametrize("shape", cases.TILE_SHAPES, ids=str)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    interpreted(cases.check_matches, shape)


@needs_triton
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    for shape in ((33, 100, 16, 3, 16), (5, 48, 5, 5, 5)):
        interpreted(cases.check_half, shape, dtype)
    interpreted(cases.check_half_selects_among_the_best, dtype)
    interpreted(cases.check_float32_memory_on_half_input, dtype)


@needs_triton
def test_ties_keep_the_lowest_parent() -> None:
    for num_parents in (7, 16, 33):
        interpreted(cases.check_ties, num_parents)


@needs_triton
def test_zero_values_leave_the_input_exactly() -> None:
    for dtype in (torch.float32, *HALF):
        interpreted(cases.check_zero_values, dtype)


@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        cases.check_nan,
        cases.check_layouts,
        cases.check_only_needed_gradients,
        cases.check_compiles_and_is_registered,
        cases.check_mixed_rows_stay_apart,
    ],
    ids=lambda check: check.__name__,
)
def test_interpreted(check: Callable[[], None]) -> None:
    interpreted(check)


# Mixed batches


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((19, 48, 16, 3, 16), dtype) for dtype in (torch.float32, *HALF)]
    + [(shape, torch.float32) for shape in ((3, 16, 5, 2, 5), (0, 16, 5, 2, 3), (21, 20, 16, 3, 8))],
    ids=str,
)
def test_mixed_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(cases.check_mixed, shape, dtype)


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
def test_mixed_loop_gives_each_row_its_own(impl: str) -> None:
    inputs = cases.make_inputs((4, 12, 6, 3, 2), torch.float64, "cpu", memories=3)
    index = torch.tensor([1, 2, -1, 1, 0], dtype=torch.int32)
    grad_output = torch.randn_like(inputs[0])
    options = {"top_k": 2, "temperature": 1.6}
    actual = cases.run(inputs, grad_output, index, function=memory_read_mixed, impl=impl, **options)
    memory_grads = {name: torch.zeros_like(tensor) for name, tensor in zip(cases.NAMES[1:], inputs[1:], strict=True)}
    for row, memory in enumerate(index.tolist()):
        if memory < 0:
            assert torch.equal(actual["output"][row], inputs[0][row])
            assert torch.equal(actual["x"][row], grad_output[row])
            continue
        row_inputs = [inputs[0][row], *(tensor[memory] for tensor in inputs[1:])]
        alone = cases.run(row_inputs, grad_output[row], impl="reference", **options)
        for name in ("output", "x"):
            torch.testing.assert_close(actual[name][row], alone[name], rtol=1e-11, atol=1e-12)
        for name, total in memory_grads.items():
            total[memory] += alone[name]
    cases.assert_all_close(actual, memory_grads, rtol=1e-11, atol=1e-12)  # float64: only the order of sums differs


# Ahead of time


def launch(
    hidden: int, parents: int, children: int, dtype: torch.dtype, x_dtype: torch.dtype, memories: int | None
) -> None:
    """Forward and backward on any numbers."""
    from sparsepeft.ops.memory.triton import memory_read_mixed_triton

    stack = memories or 1
    x = torch.zeros(2 if memories else 1, 64, hidden, dtype=x_dtype, requires_grad=True)
    memory = [
        torch.zeros(stack, *shape, hidden, dtype=dtype, requires_grad=True)
        for shape in ((parents,), (parents, children), (parents, children))
    ]
    index = torch.zeros(2, dtype=torch.long) if memories else None
    memory_read_mixed_triton(x, index, *memory, max(1, parents // 2), 1.0).sum().backward()


@needs_triton
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_assembles_without_spills(capability: int) -> None:
    """The paper's memory in bfloat16, each row its own."""
    kernels = assert_assembles(launch, 768, 16, 3, torch.bfloat16, torch.bfloat16, 4, capability=capability)
    assert [kernel.name for kernel in kernels] == ["_memory_fwd_kernel", "_memory_bwd_kernel"]


@needs_triton
@pytest.mark.slow  # float32 products take the assembler long
@pytest.mark.parametrize(
    ("sizes", "dtype", "capability"),
    [
        ((1000, 16, 3), torch.float32, 80),
        ((4096, 64, 2), torch.float32, 90),
        ((384, 33, 5), torch.bfloat16, 90),
        ((384, 33, 5), torch.float32, 80),
    ],
    ids=str,
)
def test_assembles_without_spills_at_other_sizes(
    sizes: tuple[int, int, int], dtype: torch.dtype, capability: int
) -> None:
    """A memory of this dtype on bfloat16 hidden states."""
    assert_assembles(launch, *sizes, dtype, torch.bfloat16, None, capability=capability)


# The choice, and errors


@needs_triton
def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(parents: int, **options: object) -> str:
        with FakeTensorMode():
            x, keys, cells = (torch.empty(*shape, 8, device="cuda") for shape in ((4,), (parents,), (parents, 3)))
        return explain(memory_read, x, keys, cells, cells, top_k=4, **options).impl

    assert chosen(16) == "triton"
    assert chosen(4096) == "torch"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert chosen(16) == "torch"


def test_a_gpu_on_which_nobody_ran_the_kernels_gets_none_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Graphics 9")
    for capability, is_proven in (((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        gpu._ask_current_gpu.cache_clear()
        if is_proven:
            assert gpu.why_not_triton_by_itself(x) is None
            continue
        with pytest.warns(UserWarning, match="not been run on a GPU like Graphics 9 yet.*set SPARSEPEFT_ENABLE=triton"):
            assert "not been run" in str(gpu.why_not_triton_by_itself(x))
        monkeypatch.setattr(registry, "ENABLED", frozenset({"triton"}))
        assert gpu.why_not_triton_by_itself(x) is None
    gpu._ask_current_gpu.cache_clear()


@needs_triton
def test_triton_refuses_what_it_cannot_run() -> None:
    inputs = cases.make_inputs((4, 12, 6, 3, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match="impl is 'triton', but the tensors are on no CUDA device"):
        memory_read(*inputs, top_k=2, impl="triton")
    with pytest.raises(ValueError, match=r"impl is 'triton', but the tensors are torch\.float64"):
        interpreted(memory_read, *(tensor.double() for tensor in inputs), top_k=2, impl="triton")
    inputs = cases.make_inputs((4, 12, 33, 9, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match="impl is 'triton', but P and C, padded to powers of two, are too many"):
        interpreted(memory_read, *inputs, top_k=2, impl="triton")


X, INDEX, PARENTS, CHILDREN = torch.zeros(2, 3, 8), torch.tensor([0, 1]), torch.zeros(2, 4, 8), torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], INDEX, PARENTS, CHILDREN, CHILDREN), ValueError, r"x has shape \(3, 8\); expected \(B, T, D\)"),
        ((X, INDEX.float(), PARENTS, CHILDREN, CHILDREN), TypeError, "has dtype torch.float32; expected int"),
        ((X, INDEX[:1], PARENTS, CHILDREN, CHILDREN), ValueError, "give one index per row of x"),
        ((X, INDEX + 1, PARENTS, CHILDREN, CHILDREN), ValueError, "holds 2, but 2 memories are stacked: use 0 to 1"),
        ((X, INDEX - 2, PARENTS, CHILDREN, CHILDREN), ValueError, "holds -2"),
        ((X, INDEX, PARENTS[0], CHILDREN, CHILDREN), ValueError, r"parent_keys .* expected \(A, P, D\)"),
        ((X, INDEX, PARENTS, CHILDREN, CHILDREN[0]), ValueError, r"child_values .* expected \(A, P, C, D\)"),
        ((X, INDEX, PARENTS, CHILDREN[:1], CHILDREN), ValueError, "child_keys stacks 1 memories, parent_keys 2"),
        ((X, INDEX, PARENTS, CHILDREN[..., :7], CHILDREN), ValueError, "last dimensions differ"),
    ],
)
def test_mixed_errors_say_what_to_do(arguments: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        memory_read_mixed(*arguments, top_k=2)


def test_mixed_impl_and_top_k_are_checked() -> None:
    with pytest.raises(ValueError, match="impl is 'fused'; expected one of auto, triton, cpu, torch, reference"):
        memory_read_mixed(X, INDEX, PARENTS, CHILDREN, CHILDREN, top_k=2, impl="fused")
    with pytest.raises(ValueError, match="top_k is 5, but the memory has 4 parents"):
        memory_read_mixed(X, INDEX, PARENTS, CHILDREN, CHILDREN, top_k=5)
