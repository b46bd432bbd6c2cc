"""The fused memory on a real GPU: the comparisons of the interpreter, at sizes it could not take, and the choice."""

from __future__ import annotations

import pytest
import torch
from tests.ops import memory_cases as cases

from sparsepeft.ops import memory_read, memory_read_mixed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HALF = [torch.bfloat16, torch.float16]
LARGE = [(4097, 768, 16, 3, 8), (1000, 4096, 64, 2, 8), (513, 1000, 33, 5, 8), (70_001, 64, 16, 3, 4)]


@pytest.mark.parametrize("shape", [*cases.TILE_SHAPES, *LARGE], ids=str)
def test_matches_reference(shape: tuple[int, ...]) -> None:
    cases.check_matches(shape, "cuda")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(33, 100, 16, 3, 16), (5, 48, 5, 5, 5), (1030, 768, 16, 3, 16)], ids=str)
def test_half_precision_is_as_close_to_float32_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_half(shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype) -> None:
    cases.check_half_selects_among_the_best(dtype, "cuda")
    cases.check_float32_memory_on_half_input(dtype, "cuda")


@pytest.mark.parametrize("num_parents", [7, 16, 33])
def test_ties_keep_the_lowest_parent(num_parents: int) -> None:
    cases.check_ties(num_parents, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_zero_values_leave_the_input_exactly(dtype: torch.dtype) -> None:
    cases.check_zero_values(dtype, "cuda")


@pytest.mark.parametrize(
    "check",
    [
        cases.check_nan,
        cases.check_layouts,
        cases.check_only_needed_gradients,
        cases.check_compiles_and_is_registered,
        cases.check_mixed_rows_stay_apart,
    ],
)
def test_check(check: object) -> None:
    check("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(19, 48, 16, 3, 16), (513, 768, 16, 3, 16)], ids=str)
def test_mixed_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_mixed(shape, dtype, "cuda")


def test_mixed_takes_its_index_from_either_side() -> None:
    inputs = cases.make_inputs((21, 20, 16, 3, 8), torch.float32, "cuda", memories=3)
    index = torch.tensor([2, -1, 0, 1, 2])
    for impl in ("triton", "torch"):
        on_cpu, on_gpu = (
            memory_read_mixed(inputs[0], i, *inputs[1:], top_k=8, impl=impl) for i in (index, index.cuda())
        )
        assert torch.equal(on_cpu, on_gpu)
    with pytest.raises(ValueError, match="memory_index holds 3"):
        memory_read_mixed(inputs[0], index + 1, *inputs[1:], top_k=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_runs_what_it_should(dtype: torch.dtype) -> None:
    inputs = cases.make_inputs((40, 96, 16, 3, 8), dtype, "cuda")
    impl = "triton" if dtype == torch.float32 else "torch"
    assert torch.equal(memory_read(*inputs, top_k=8), memory_read(*inputs, top_k=8, impl=impl))


def test_gradients_are_the_same_every_time() -> None:
    inputs = cases.make_inputs((5000, 768, 16, 3, 8), torch.bfloat16, "cuda")
    grad_output = torch.randn_like(inputs[0])
    first, second = (cases.run(inputs, grad_output, top_k=8, impl="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
