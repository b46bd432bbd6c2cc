"""What the fused memory must satisfy, wherever it runs: in Triton's interpreter (cpu) or on a GPU (cuda).

Functions at module level, so that they can be handed to the interpreter's process by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepeft.ops import memory_read, memory_read_mixed

NAMES = ("x", "parent_keys", "child_keys", "child_values")

# N, D, P, C, K: each number at its odd sizes, not every combination.
SHAPES = [
    (0, 16, 3, 2, 2),
    (1, 16, 1, 1, 1),
    (5, 48, 3, 1, 1),
    (5, 100, 5, 5, 5),
    (33, 100, 16, 3, 8),
    (33, 48, 5, 2, 3),
    (17, 16, 33, 5, 7),
    (16, 24, 16, 16, 16),
    (130, 384, 16, 3, 8),
    (130, 48, 33, 1, 32),
]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, memories: int | None = None) -> list[Tensor]:
    """A tensor per name; with ``memories`` a stack of so many, and x of five rows."""
    tokens, hidden, parents, children, _ = shape
    lead = () if memories is None else (memories,)
    tensors = [
        torch.randn(*(() if memories is None else (5,)), tokens, hidden),
        # Scores of unit size: softmaxes neither flat nor one-hot.
        torch.randn(*lead, parents, hidden) / hidden**0.5,
        torch.randn(*lead, parents, children, hidden) / hidden**0.5,
        torch.randn(*lead, parents, children, hidden),
    ]
    return [tensor.to(device, dtype) for tensor in tensors]


def settle_near_ties(inputs: list[Tensor], top_k: int) -> None:
    """Make tokens zero whose K-th and next score are within rounding of each other: then all tie, exactly."""
    if top_k < len(inputs[1]):
        scores = (inputs[0].double() @ inputs[1].double().T).sort(-1, descending=True).values
        inputs[0][scores[..., top_k - 1] - scores[..., top_k] < 1e-4] = 0


def run(function: Any, inputs: list[Tensor], grad_output: Tensor, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(leaves[0], *arguments, *leaves[1:], **options)
    grads = torch.autograd.grad(output, leaves, grad_output)
    return {"output": output.detach(), **dict(zip(NAMES, grads, strict=True))}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    for name, value in expected.items():
        # A tensor's size scales its tolerance: gradients sum over tokens, outputs do not. NaN never matches.
        scale = value.abs().amax().item() if value.numel() else 1.0
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol * max(scale, 1.0), msg=lambda m, name=name: f"{name}: {m}"
        )


def largest_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor over its largest entry."""
    return {
        name: ((actual[name].double() - value.double()).abs().max() / value.abs().max().clamp_min(1e-30)).item()
        for name, value in expected.items()
        if value.numel()
    }


def check_float32(shape: tuple[int, ...], device: str = "cpu") -> dict[str, float]:
    inputs, top_k = make_inputs(shape, torch.float32, device), shape[-1]
    settle_near_ties(inputs, top_k)
    grad_output = torch.randn_like(inputs[0])
    expected = run(memory_read, inputs, grad_output, top_k=top_k, temperature=1.6, impl="reference")
    actual = run(memory_read, inputs, grad_output, top_k=top_k, temperature=1.6, impl="triton")
    # A few units of float32 rounding (6e-8) through sums of up to 384 terms, two products and two softmaxes.
    assert_all_close(actual, expected, rtol=1e-5, atol=4e-6)
    return largest_errors(actual, expected)


def check_half(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """K = P: rounded scores must not change what is selected, only how exactly it is computed."""
    inputs, top_k = make_inputs(shape, dtype, device), shape[2]
    grad_output = torch.randn_like(inputs[0])
    exact = run(memory_read, [t.float() for t in inputs], grad_output.float(), top_k=top_k, impl="reference")
    reference = run(memory_read, inputs, grad_output, top_k=top_k, impl="reference")
    actual = run(memory_read, inputs, grad_output, top_k=top_k, impl="triton")
    for name, value in exact.items():
        assert actual[name].dtype == dtype
        error, allowed = ((r[name].float() - value).abs().max() for r in (actual, reference))
        # Twice the plain code's error, or one rounding of the largest entry where the plain code is lucky.
        assert error <= max(2 * allowed, torch.finfo(dtype).eps * value.abs().max()), name


def check_half_selects_among_the_best(dtype: torch.dtype, device: str = "cpu") -> None:
    """With K=1 and one-hot values the output names the parent; near ties may be rounded differently."""
    parents = hidden = 24
    x, parent_keys = torch.randn(50, hidden), torch.randn(parents, hidden) / hidden**0.5
    child_values = torch.eye(parents).unsqueeze(1).mul(1e3)
    x, parent_keys, child_values = (tensor.to(device, dtype) for tensor in (x, parent_keys, child_values))
    read = memory_read(x, parent_keys, torch.zeros_like(child_values), child_values, top_k=1, impl="triton")
    chosen = read.float().argmax(-1, keepdim=True)
    scores = x.float() @ parent_keys.float().T
    shortfall = scores.amax(-1, keepdim=True) - scores.gather(-1, chosen)
    assert shortfall.max() <= 2 * torch.finfo(dtype).eps * scores.abs().max()


def check_float32_memory_on_half_input(dtype: torch.dtype, device: str = "cpu") -> None:
    """Converting x in the kernel is converting it before."""
    inputs = make_inputs((9, 24, 16, 3, 8), torch.float32, device)
    inputs[0] = inputs[0].to(dtype)
    grad_output = torch.randn_like(inputs[0])
    upcast = [tensor.float() for tensor in inputs]
    actual = run(memory_read, inputs, grad_output, top_k=8, impl="triton")
    expected = run(memory_read, upcast, grad_output.float(), top_k=8, impl="triton")
    for name, value in expected.items():
        kept = name in NAMES[1:]
        assert actual[name].dtype == (torch.float32 if kept else dtype)
        # Memory: float32 rounding. Output and x: rounded once at the end, perhaps to the other side.
        rtol = 1e-5 if kept else torch.finfo(dtype).eps
        torch.testing.assert_close(actual[name].float(), value, rtol=rtol, atol=4e-5, msg=lambda m, n=name: f"{n}: {m}")
    narrow_memory = [upcast[0], *(tensor.to(dtype) for tensor in inputs[1:])]
    actual = run(memory_read, narrow_memory, grad_output.float(), top_k=8, impl="triton")
    assert actual["output"].dtype == torch.float32
    assert all(actual[name].dtype == dtype for name in NAMES[1:])


def check_ties(num_parents: int, device: str = "cpu") -> None:
    """Small integers make every score exact; the reference keeps the lowest index."""
    hidden, top_k = 16, 5
    x = torch.randint(-1, 2, (40, hidden)).float()
    parent_keys = torch.randint(-1, 2, (num_parents, hidden)).float()
    parent_keys[3::4] = parent_keys[2]  # ties at the K-th place too, and a row of zeros ties everywhere
    x[0] = 0
    inputs = [x, parent_keys, torch.zeros(num_parents, 1, hidden), torch.randn(num_parents, 1, hidden)]
    inputs = [tensor.to(device) for tensor in inputs]
    grad_output = torch.randn_like(inputs[0])
    expected = run(memory_read, inputs, grad_output, top_k=top_k, impl="reference")
    actual = run(memory_read, inputs, grad_output, top_k=top_k, impl="triton")
    assert_all_close(actual, expected, rtol=1e-5, atol=4e-6)  # as above; a wrong parent is off by about 1


def check_nan(device: str = "cpu") -> None:
    shape = (7, 24, 16, 3, 8)
    inputs = make_inputs(shape, torch.float32, device)
    clean = memory_read(*inputs, top_k=8, impl="reference")
    inputs[0][2, 5] = torch.nan
    output = memory_read(*inputs, top_k=8, impl="triton")
    assert output[2].isnan().all()
    others = [token for token in range(7) if token != 2]
    torch.testing.assert_close(output[others], clean[others], rtol=1e-5, atol=4e-6)
    # A parent that scores NaN counts as the largest, so every token keeps it, also where one is kept.
    inputs = make_inputs(shape, torch.float32, device)
    inputs[1][11] = torch.nan
    assert memory_read(*inputs, top_k=1, impl="triton").isnan().all()


def check_zero_values(dtype: torch.dtype, device: str = "cpu") -> None:
    x, parent_keys, child_keys, child_values = make_inputs((9, 24, 16, 3, 8), dtype, device)
    output = memory_read(x, parent_keys, child_keys, torch.zeros_like(child_values), top_k=8, impl="triton")
    assert torch.equal(output, x)
    assert output.data_ptr() != x.data_ptr()


def check_layouts(device: str = "cpu") -> None:
    """Strided x, strided memory, a gradient as from a sum; leading dimensions; autocast, also around backward."""
    _, *memory = make_inputs((1, 20, 16, 3, 8), torch.float32, device)
    memory[0] = memory[0].T.contiguous().T
    wide, swapped = torch.randn(3, 7, 40, device=device), torch.randn(7, 3, 20, device=device).transpose(0, 1)
    for x in (wide[..., ::2], wide[..., 20:], swapped, torch.randn(20, device=device)):
        grad_output = torch.randn([1] * x.ndim, device=device).expand_as(x)
        expected = run(memory_read, [x, *memory], grad_output, top_k=8, impl="reference")
        actual = run(memory_read, [x, *memory], grad_output, top_k=8, impl="triton")
        assert_all_close(actual, expected, rtol=1e-5, atol=4e-6)
        with torch.autocast(device, dtype=torch.bfloat16):
            actual = run(memory_read, [x, *memory], grad_output, top_k=8, impl="triton")
        assert_all_close(actual, expected, rtol=1e-5, atol=4e-6)


def check_only_needed_gradients(device: str = "cpu") -> None:
    shape = (6, 20, 7, 3, 4)
    inputs = make_inputs(shape, torch.float32, device)
    grad_output = torch.randn_like(inputs[0])
    expected = run(memory_read, inputs, grad_output, top_k=4, impl="reference")
    for needed in ((0,), (1, 2, 3), (2,), (0, 3)):
        leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs)]
        memory_read(*leaves, top_k=4, impl="triton").backward(grad_output)
        for index, (name, leaf) in enumerate(zip(NAMES, leaves, strict=True)):
            if index in needed:
                torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-5, atol=4e-5)  # sums of 6 tokens
            else:
                assert leaf.grad is None


def check_compiles_and_is_registered(device: str = "cpu") -> None:
    inputs = make_inputs((6, 20, 7, 3, 4), torch.float32, device)
    stacked = [tensor.unsqueeze(0) for tensor in inputs]
    index = torch.zeros(1, dtype=torch.long, device=device)
    for flags, memory_index in (((0, 0), index), ((0, 1), None), ((1, 0), index), ((1, 1), None), ((1, 1), index)):
        x = stacked[0].detach().requires_grad_(flags[0] == 1)
        memory = [tensor.detach().requires_grad_(flags[1] == 1) for tensor in stacked[1:]]
        arguments = (x, memory_index, *memory, 4, 1.5, any(flags))
        torch.library.opcheck(torch.ops.sparsepeft.memory_read_triton.default, arguments)
    grad_output = torch.randn_like(inputs[0])
    compiled = torch.compile(memory_read, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 4):
        few = [inputs[0][:tokens], *inputs[1:]]
        expected = run(memory_read, few, grad_output[:tokens], top_k=4, impl="reference")
        assert_all_close(run(compiled, few, grad_output[:tokens], top_k=4, impl="triton"), expected, 1e-5, 4e-6)


# Mixed batches


def check_mixed(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Float32 against the loop with the reference; half precision against the float32 loop, as above."""
    inputs, top_k = make_inputs(shape, dtype, device, memories=3), shape[-1]
    index = torch.tensor([2, -1, 0, 2, 2], device=device)  # memory 1 is read by nobody
    grad_output = torch.randn_like(inputs[0])
    exact = [tensor.float() for tensor in inputs]
    expected = run(memory_read_mixed, exact, grad_output.float(), index, top_k=top_k, temperature=0.7, impl="reference")
    actual = run(memory_read_mixed, inputs, grad_output, index, top_k=top_k, temperature=0.7, impl="triton")
    assert torch.equal(actual["output"][1], inputs[0][1])
    assert torch.equal(actual["x"][1], grad_output[1])
    assert not any(actual[name][1].any() for name in NAMES[1:])
    if dtype == torch.float32:
        assert_all_close(actual, expected, rtol=1e-5, atol=4e-6)
        return
    plain = run(memory_read_mixed, inputs, grad_output, index, top_k=top_k, temperature=0.7, impl="reference")
    for name, value in expected.items():
        error, allowed = ((r[name].float() - value).abs().max() for r in (actual, plain))
        assert error <= max(2 * allowed, torch.finfo(dtype).eps * value.abs().max()), name


def check_mixed_rows_stay_apart(device: str = "cpu") -> None:
    """A row gives what it gives alone, and nobody else's NaN reaches it; a bad index shows."""
    inputs = make_inputs((18, 24, 16, 3, 8), torch.float32, device, memories=3)
    index = torch.tensor([2, -1, 0, 1, 2], device=device)
    inputs[1][1], inputs[0][1, 0, 0], inputs[0][1, 1, 0] = torch.nan, torch.nan, torch.inf
    grad_output = torch.ones_like(inputs[0])
    grad_output[1, 0, 0] = torch.nan
    mixed = run(memory_read_mixed, inputs, grad_output, index, top_k=8, impl="triton")
    torch.testing.assert_close(mixed["output"][1], inputs[0][1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mixed["x"][1], grad_output[1], rtol=0, atol=0, equal_nan=True)
    assert mixed["output"][3].isnan().all()
    for row in (0, 2, 4):
        memory = [tensor[index[row]] for tensor in inputs[1:]]
        alone = memory_read(inputs[0][row], *memory, top_k=8, impl="triton")
        torch.testing.assert_close(mixed["output"][row], alone, rtol=1e-5, atol=4e-6)
    for name in NAMES[1:]:
        assert not mixed[name][[0, 2]].isnan().any(), name

    from sparsepeft.ops.memory.triton import memory_read_mixed_triton

    output = memory_read_mixed_triton(inputs[0], index + 1, *inputs[1:], 8, 1.0)  # past the checks, as on a GPU
    assert output[[0, 4]].isnan().all()
    assert not output[3].isnan().any()
