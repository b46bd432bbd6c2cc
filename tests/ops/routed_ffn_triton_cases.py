"""What runs in the processes of ``triton_aot``: comparisons for the interpreter, launches for the assembler."""

from __future__ import annotations

import torch
from tests.ops.routed_ffn_cases import Form, Sizes, assert_all_close, make_case, run

from sparsepeft.ops.routed_ffn.pytorch import Groups
from sparsepeft.ops.routed_ffn.triton import TritonProducts


def check_case(form: Form, sizes: Sizes, activation: str, recompute: bool = False, device: str = "cpu") -> None:
    case = make_case(form, sizes, torch.float32)
    case = case._replace(tensors={name: tensor.to(device) for name, tensor in case.tensors.items()})
    expected = run(case.to(torch.float64), activation=activation, impl="reference")
    actual = run(case, activation=activation, recompute=recompute, impl="triton")
    # Some tens of float32 roundings (6e-8) of terms of up to 10, which in the router's gradient cancel to unit size;
    # how many meet depends on the order in which a processor's matrix products sum up.
    assert_all_close({name: value.double() for name, value in actual.items()}, expected, tolerance=2e-5)


def check_half(form: Form, sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> None:
    """As close to float32 as the looped form is, which the reference bounds in its turn."""
    case = make_case(form, sizes, torch.float32).to(dtype)
    case = case._replace(tensors={name: tensor.to(device) for name, tensor in case.tensors.items()})
    logits = case.tensors["x"].float() @ case.tensors["router.weight"].float().T
    options = {"activation": "silu", "blocks": logits.topk(sizes.active).indices}
    exact = run(case.to(torch.float32), impl="reference", **options)
    looped = run(case, impl="looped", **options)
    actual = run(case, impl="triton", **options)
    for name, value in exact.items():
        assert actual[name].dtype == dtype
        error, allowed = ((r[name].float() - value).abs().max() for r in (actual, looped))
        # Twice that error, or four roundings of the largest entry where the looped form is lucky.
        assert error <= max(2 * allowed, 4 * torch.finfo(dtype).eps * value.abs().max()), name


def launch_products(dtype: torch.dtype, weight_dtype: torch.dtype, rank: int) -> None:
    """Every product at the sizes of a block of 1024 to 4096, and of a low-rank update."""
    tokens, hidden, block, num_blocks = 64, 1024, 512, 8
    groups = Groups(torch.arange(tokens * 4).view(tokens, 4) % num_blocks, num_blocks)
    products, tile = TritonProducts(groups), groups.whole()
    h = torch.zeros(tokens * 4, block, dtype=dtype)
    for size in (hidden, rank):
        x = torch.zeros(tokens, size, dtype=dtype)
        up = torch.zeros(num_blocks * block, size, dtype=weight_dtype).unflatten(0, (num_blocks, -1))
        down = torch.zeros(size, num_blocks * block, dtype=weight_dtype).unflatten(1, (num_blocks, -1)).permute(1, 2, 0)
        for weight in (up, down):
            products.inner(tile, x, weight)
            products.outer(tile, h, weight)
            products.add_gradient(tile, weight, h, x)
