"""The Triton products of routed_ffn and exact_ffn on a real GPU: all forms and sizes, larger ones, and the choice."""

from __future__ import annotations

import pytest
import torch
from tests.ops import routed_ffn_cases as cases
from tests.ops.routed_ffn_cases import FORMS, TILE_SIZES, Form, Sizes
from tests.ops.triton_aot import needs_triton

from sparsepeft.ops import Projection, explain, route, routed_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_triton,
]

LARGE = Sizes(1030, 256, 64, 8, 4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", TILE_SIZES)
def test_matches_reference(sizes: str, form: Form) -> None:
    for activation in ("relu", "silu"):
        cases.check_case(form, TILE_SIZES[sizes], activation, device="cuda")


@pytest.mark.parametrize("form", [FORMS[0], FORMS[-1]], ids=str)
@pytest.mark.parametrize("sizes", TILE_SIZES)
def test_exact_matches_reference(sizes: str, form: Form) -> None:
    for activation in ("relu", "silu"):
        cases.check_case(form, TILE_SIZES[sizes], activation, device="cuda", routed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", [TILE_SIZES["several of many"], LARGE], ids=str)
def test_half_precision(sizes: Sizes, form: Form, dtype: torch.dtype) -> None:
    case = cases.make_case(form, sizes, torch.float32)
    cases.check_half(case, dtype, {"triton": "looped"}, "silu", device="cuda")


def test_auto_is_triton() -> None:
    x, weight = torch.randn(6, 8, device="cuda"), torch.randn(64, 8, device="cuda")
    up, down, routing = Projection(weight), Projection(weight.t()), route(x, weight[:4], num_active=2)
    assert explain(routed_ffn, x, up, down, routing, activation="relu").impl == "triton"
