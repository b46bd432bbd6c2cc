"""The Triton products of routed_ffn on a real GPU: every form at every size, larger ones, and the choice."""

from __future__ import annotations

import pytest
import torch
from tests.ops.routed_ffn_cases import FORMS, TILE_SIZES, Form, Sizes
from tests.ops.triton_aot import needs_triton

from sparsepeft.ops import Projection, explain, route, routed_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_triton,
]

LARGE = Sizes(1030, 256, 64, 8, 4)


def check(name: str, *args: object) -> None:
    """Call a function of the cases, which import Triton."""
    from tests.ops import routed_ffn_triton_cases

    getattr(routed_ffn_triton_cases, name)(*args, device="cuda")


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", TILE_SIZES)
def test_matches_reference(sizes: str, form: Form) -> None:
    for activation in ("relu", "silu"):
        check("check_case", form, TILE_SIZES[sizes], activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("sizes", [TILE_SIZES["several of many"], LARGE], ids=str)
def test_half_precision(sizes: Sizes, form: Form, dtype: torch.dtype) -> None:
    check("check_half", form, sizes, dtype)


def test_auto_is_triton() -> None:
    x, weight = torch.randn(6, 8, device="cuda"), torch.randn(64, 8, device="cuda")
    up, down, routing = Projection(weight), Projection(weight.t()), route(x, weight[:4], num_active=2)
    assert explain(routed_ffn, x, up, down, routing, activation="relu").impl == "triton"
