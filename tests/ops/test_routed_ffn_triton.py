"""The Triton products of routed_ffn against the reference: interpreted and assembled."""

from __future__ import annotations

import pytest
import torch
from tests.ops.routed_ffn_cases import FORMS, TILE_SIZES, Form
from tests.ops.triton_aot import CAPABILITIES, assert_assembles, interpreted, needs_triton

pytestmark = needs_triton

FULL = Form(gated=True, bias=True, trained=True, lora=True)


def check(name: str, *args: object, **options: object) -> None:
    """Call a function of the cases, which import Triton, where that is wanted."""
    from tests.ops import routed_ffn_triton_cases

    getattr(routed_ffn_triton_cases, name)(*args, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_interpreted_matches_reference(form: Form) -> None:
    # Plain ReLU has a way of its own where the weights are frozen; all else shares the looped form's code.
    interpreted(check, "check_case", form, TILE_SIZES["several of many"], "silu" if form.gated else "relu")


@pytest.mark.parametrize("sizes", TILE_SIZES)
def test_interpreted_at_every_size(sizes: str) -> None:
    interpreted(check, "check_case", FULL, TILE_SIZES[sizes], "gelu", recompute=True)
    interpreted(check, "check_case", Form(False, True, False, True), TILE_SIZES[sizes], "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [FULL, Form(False, False, False, False)], ids=str)
def test_interpreted_in_half_precision(form: Form, dtype: torch.dtype) -> None:
    interpreted(check, "check_half", form, TILE_SIZES["several of many"], dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        pytest.param(torch.float16, torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_assembles_without_spills(dtype: torch.dtype, weight_dtype: torch.dtype, capability: int) -> None:
    kernels = assert_assembles(check, "launch_products", dtype, weight_dtype, 16, capability=capability)
    assert {kernel.name for kernel in kernels} == {"_grouped_fwd_kernel", "_grouped_bwd_kernel"}


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the Triton form got torch.float64; it takes float32, bfloat16 or float16"):
        interpreted(check, "check_half", FULL, TILE_SIZES["odd"], torch.float64)
