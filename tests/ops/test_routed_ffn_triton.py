"""The Triton products of routed_ffn against the reference: interpreted and assembled."""

from __future__ import annotations

import pytest
import torch
from tests.ops import routed_ffn_cases as cases
from tests.ops.routed_ffn_cases import TILE_SIZES, Form
from tests.ops.triton_aot import assert_assembles, interpreted, needs_triton

pytestmark = needs_triton

FULL = Form(gated=True, bias=True, trained=True, lora=True)
PLAIN = Form(gated=False, bias=False, trained=False, lora=False)


@pytest.mark.parametrize(
    "form", [FULL, PLAIN, Form(False, True, False, True), Form(True, False, False, False)], ids=str
)
def test_interpreted_matches_reference(form: Form) -> None:
    # Plain ReLU has a way of its own where the weights are frozen; all else shares the looped form's code.
    interpreted(
        cases.check_case, form, TILE_SIZES["several of many"], "silu" if form.gated else "relu", (("triton", False),)
    )


@pytest.mark.parametrize("sizes", TILE_SIZES)
def test_interpreted_at_every_size(sizes: str) -> None:
    interpreted(cases.check_case, FULL, TILE_SIZES[sizes], "gelu", (("triton", True),))
    interpreted(cases.check_case, Form(False, True, False, True), TILE_SIZES[sizes], "relu", (("triton", False),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreted_in_half_precision(dtype: torch.dtype) -> None:
    for form in (FULL, PLAIN):
        case = cases.make_case(form, TILE_SIZES["several of many"], torch.float32)
        interpreted(cases.check_half, case, dtype, {"triton": "looped"}, "silu")


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "capability"),
    [
        (torch.bfloat16, torch.bfloat16, 80),
        (torch.bfloat16, torch.bfloat16, 90),
        pytest.param(torch.float32, torch.float32, 80, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, torch.float32, 90, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_assembles_without_spills(dtype: torch.dtype, weight_dtype: torch.dtype, capability: int) -> None:
    kernels = assert_assembles(cases.launch_products, dtype, weight_dtype, 16, capability=capability)
    assert {kernel.name for kernel in kernels} == {"_grouped_fwd_kernel", "_grouped_bwd_kernel"}


def test_float64_is_refused() -> None:
    case = cases.make_case(FULL, TILE_SIZES["odd"])
    with pytest.raises(
        ValueError, match=r"impl is 'triton', but the tensors are torch\.float64, the Triton kernels take"
    ):
        interpreted(cases.run, case, activation="silu", impl="triton")
