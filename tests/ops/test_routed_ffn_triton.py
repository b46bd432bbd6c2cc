"""The Triton products of routed_ffn against the reference: interpreted, assembled, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from tests.ops.routed_ffn_cases import FORMS, Form, Sizes
from tests.ops.triton_aot import CAPABILITIES, assert_assembles, interpreted, needs_triton

from sparsepeft.ops import explain_routed_ffn_impl

pytestmark = needs_triton

FULL = Form(gated=True, bias=True, trained=True, lora=True)
SIZES = {
    "no token": Sizes(0, 5, 3, 4, 2),
    "one token": Sizes(1, 5, 3, 4, 1),
    "odd": Sizes(7, 5, 3, 4, 2),
    "several of many": Sizes(30, 20, 5, 6, 3),
    "all blocks": Sizes(7, 48, 16, 4, 4),
    "wider than a tile": Sizes(5, 70, 67, 2, 1),
    "a block of several tiles": Sizes(150, 5, 3, 2, 1),
}


def check(name: str, *args: object, **options: object) -> None:
    """Call a function of the cases, which import Triton, where that is wanted."""
    from tests.ops import routed_ffn_triton_cases

    getattr(routed_ffn_triton_cases, name)(*args, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_interpreted_matches_reference(form: Form) -> None:
    # Plain ReLU has a way of its own where the weights are frozen; all else shares the looped form's code.
    interpreted(check, "check_case", form, SIZES["several of many"], "silu" if form.gated else "relu")


@pytest.mark.parametrize("sizes", SIZES)
def test_interpreted_at_every_size(sizes: str) -> None:
    interpreted(check, "check_case", FULL, SIZES[sizes], "gelu", recompute=True)
    interpreted(check, "check_case", Form(False, True, False, True), SIZES[sizes], "relu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [FULL, Form(False, False, False, False)], ids=str)
def test_interpreted_in_half_precision(form: Form, dtype: torch.dtype) -> None:
    interpreted(check, "check_half", form, SIZES["several of many"], dtype)


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
        interpreted(check, "check_half", FULL, SIZES["odd"], torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_on_a_gpu(sizes: str, form: Form) -> None:
    for activation in ("relu", "silu"):
        check("check_case", form, SIZES[sizes], activation, device="cuda")
    check("check_half", form, SIZES[sizes], torch.bfloat16, device="cuda")
    assert explain_routed_ffn_impl("cuda", torch.bfloat16, 16).impl == "triton"
