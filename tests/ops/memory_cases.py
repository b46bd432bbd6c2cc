"""What every implementation of the memory must satisfy, on a CPU, in Triton's interpreter (cpu), or on a GPU (cuda).

"dense", "selected" and "gathered" are the forms between which ``impl="torch"`` chooses. Functions at module level, so
that they can be handed to the interpreter's process by reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sparsepeft.ops import memory_read, memory_read_mixed
from sparsepeft.ops.memory import choice
from sparsepeft.ops.memory.pytorch import memory_read_dense, memory_read_gathered
from sparsepeft.ops.memory.pytorch_selected import TILE_SLOTS, memory_read_selected

FORMS = {"dense": memory_read_dense, "selected": memory_read_selected, "gathered": memory_read_gathered}
NAMES = ("x", "parent_keys", "child_keys", "child_values")

# (leading dimensions of x), D, P, C, K. Odd on purpose; each line names what it adds.
SHAPES = {
    "paper-like": ((3, 7), 24, 16, 3, 8),
    "odd": ((2, 5), 13, 7, 3, 4),
    "a single vector": ((), 9, 5, 2, 2),
    "three leading dimensions": ((2, 3, 2), 10, 6, 1, 3),
    "all parents": ((4, 3), 12, 6, 3, 6),
    "one selected": ((5, 3), 12, 6, 3, 1),
    "one parent": ((5, 3), 12, 1, 4, 1),
    "one of each": ((2, 2), 3, 1, 1, 1),
    "one token": ((1, 1), 17, 40, 5, 6),
    "no tokens": ((0, 4), 8, 5, 2, 3),
    "no tokens, many parents": ((2, 0), 8, 50, 2, 3),
    "many parents": ((4, 9), 16, 131, 3, 5),  # beyond the stable sort: top-k and a check for ties
    "sparse use of many parents": ((3,), 16, 700, 2, 2),  # tiles of parents that are no neighbours
    "many tokens per parent": ((TILE_SLOTS + 77,), 4, 3, 2, 2),  # a parent spans several tiles
    "wide": ((3, 5), 768 + 16 + 5, 16, 3, 8),  # every width of the compiled kernel's loops
}
# For the tiles of Triton's kernels: N, D, P, C, K, each number at its odd sizes, not every combination.
TILE_SHAPES = [
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
Shape = str | tuple[Any, ...]


def read(*tensors: Tensor, impl: str, **options: object) -> Tensor:
    """Call ``memory_read`` with an implementation, or with one of PyTorch's forms."""
    if impl not in FORMS:
        return memory_read(*tensors, impl=impl, **options)
    with mock.patch.object(choice, "_choose_form", return_value=FORMS[impl]):
        return memory_read(*tensors, impl="torch", **options)


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    memories: int | None = None,
    memory_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """A tensor per name; with ``memories`` a stack of so many, and x of five rows."""
    tokens, hidden, parents, children, _ = SHAPES[shape] if isinstance(shape, str) else shape
    lead = (tokens,) if isinstance(tokens, int) else tokens
    rows, stack = ((), ()) if memories is None else ((5,), (memories,))
    x = torch.randn(*rows, *lead, hidden)
    memory = [
        # Scores of unit size: softmaxes neither flat nor one-hot.
        torch.randn(*stack, parents, hidden) / hidden**0.5,
        torch.randn(*stack, parents, children, hidden) / hidden**0.5,
        torch.randn(*stack, parents, children, hidden),
    ]
    return [x.to(device, dtype), *(tensor.to(device, memory_dtype or dtype) for tensor in memory)]


def settle_near_ties(inputs: list[Tensor], top_k: int) -> None:
    """Make tokens zero whose K-th and next score are within rounding of each other: then all tie, exactly."""
    if top_k < len(inputs[1]):
        scores = (inputs[0].double() @ inputs[1].double().T).sort(-1, descending=True).values
        inputs[0][scores[..., top_k - 1] - scores[..., top_k] < 1e-4] = 0


def run(
    inputs: list[Tensor], grad_output: Tensor, *arguments: Any, function: Any = read, **options: Any
) -> dict[str, Tensor]:
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


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """In float64 only the order of summation differs.

    In float32 a few units of rounding (6e-8) through sums of up to 384 terms, two products and two softmaxes.
    """
    return {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 4e-6}


def check_matches(
    shape: Shape, device: str = "cpu", impls: Iterable[str] = ("triton",), dtype: torch.dtype = torch.float32
) -> None:
    inputs, top_k = make_inputs(shape, dtype, device), (SHAPES[shape] if isinstance(shape, str) else shape)[-1]
    settle_near_ties(inputs, top_k)
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=top_k, temperature=1.6, impl="reference")
    for impl in impls:
        actual = run(inputs, grad_output, top_k=top_k, temperature=1.6, impl=impl)
        assert actual["output"].shape == inputs[0].shape
        assert_all_close(actual, expected, **tolerance(dtype))


def check_half(shape: Shape, dtype: torch.dtype, device: str = "cpu", impl: str = "triton") -> None:
    """K = P: rounded scores must not change what is selected, only how exactly it is computed."""
    inputs = make_inputs(shape, dtype, device)
    top_k, grad_output = len(inputs[1]), torch.randn_like(inputs[0])
    wide = [tensor.float() for tensor in inputs]
    exact = run(wide, grad_output.float(), top_k=top_k, impl="reference")
    assert_all_close(run(wide, grad_output.float(), top_k=top_k, impl=impl), exact, **tolerance(torch.float32))
    reference = run(inputs, grad_output, top_k=top_k, impl="reference")
    actual = run(inputs, grad_output, top_k=top_k, impl=impl)
    for name, value in exact.items():
        assert actual[name].dtype == dtype
        error, allowed = ((r[name].float() - value).abs().max() for r in (actual, reference))
        # Twice the plain code's error, or one rounding of the largest entry where the plain code is lucky.
        assert error <= max(2 * allowed, torch.finfo(dtype).eps * value.abs().max()), name


def check_half_selects_among_the_best(dtype: torch.dtype, device: str = "cpu", impl: str = "triton") -> None:
    """With K=1 and one-hot values the output names the parent; near ties may be rounded differently."""
    parents = hidden = 24
    x, parent_keys = torch.randn(50, hidden), torch.randn(parents, hidden) / hidden**0.5
    child_values = torch.eye(parents).unsqueeze(1).mul(1e3)
    x, parent_keys, child_values = (tensor.to(device, dtype) for tensor in (x, parent_keys, child_values))
    output = read(x, parent_keys, torch.zeros_like(child_values), child_values, top_k=1, impl=impl)
    chosen = output.float().argmax(-1, keepdim=True)
    scores = x.float() @ parent_keys.float().T
    shortfall = scores.amax(-1, keepdim=True) - scores.gather(-1, chosen)
    assert shortfall.max() <= 2 * torch.finfo(dtype).eps * scores.abs().max()  # both scores off by a rounding


def check_float32_memory_on_half_input(dtype: torch.dtype, device: str = "cpu", impl: str = "triton") -> None:
    """Converting x in the kernel is converting it before."""
    inputs = make_inputs("paper-like", dtype, device, memory_dtype=torch.float32)
    grad_output = torch.randn_like(inputs[0])
    upcast = [tensor.float() for tensor in inputs]
    actual = run(inputs, grad_output, top_k=8, impl=impl)
    expected = run(upcast, grad_output.float(), top_k=8, impl=impl)
    for name, value in expected.items():
        kept = name in NAMES[1:]
        assert actual[name].dtype == (torch.float32 if kept else dtype)
        if impl != "triton":
            assert torch.equal(actual[name], value.to(actual[name].dtype))
            continue
        # Memory: float32 rounding. Output and x: rounded once at the end, perhaps to the other side.
        rtol = 1e-5 if kept else torch.finfo(dtype).eps
        torch.testing.assert_close(actual[name].float(), value, rtol=rtol, atol=4e-5, msg=lambda m, n=name: f"{n}: {m}")
    narrow_memory = [upcast[0], *(tensor.to(dtype) for tensor in inputs[1:])]
    actual = run(narrow_memory, grad_output.float(), top_k=8, impl=impl)
    assert actual["output"].dtype == torch.float32
    assert all(actual[name].dtype == dtype for name in NAMES[1:])


def lowest_indices(scores: Tensor, top_k: int) -> list[list[int]]:
    """The best of each row; of equal ones the first."""
    return [sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]) for row in scores.tolist()]


def check_ties(num_parents: int, device: str = "cpu", impl: str = "triton") -> None:
    """Small integers make every score exact, whatever the order of summation."""
    hidden, top_k = 16, 5
    x = torch.randint(-1, 2, (40, hidden)).float()
    parent_keys = torch.randint(-1, 2, (num_parents, hidden)).float()
    parent_keys[3::4] = parent_keys[2]  # ties at the K-th place too, and a row of zeros ties everywhere
    x[0] = 0
    inputs = [x, parent_keys, torch.zeros(num_parents, 1, hidden), torch.randn(num_parents, 1, hidden)]
    scores = x @ parent_keys.T
    selected = torch.tensor(lowest_indices(scores, top_k))
    gate = torch.softmax(scores.gather(-1, selected), -1)
    expected = x + torch.einsum("nk,nkd->nd", gate, inputs[3][selected, 0])
    inputs = [tensor.to(device) for tensor in inputs]
    grad_output = torch.randn_like(inputs[0])
    actual = run(inputs, grad_output, top_k=top_k, impl=impl)
    torch.testing.assert_close(actual["output"].cpu(), expected, rtol=1e-5, atol=1e-5)  # a wrong parent is off by 1
    unused = torch.ones(num_parents, dtype=torch.bool)
    unused[selected.flatten()] = False
    assert not actual["child_values"][unused].any()
    reference = run(inputs, grad_output, top_k=top_k, impl="reference")
    assert_all_close(actual, reference, **tolerance(torch.float32))


def check_nan(device: str = "cpu", impl: str = "triton", shape: Shape = ((3, 7), 24, 16, 3, 8)) -> None:
    inputs, top_k = make_inputs(shape, torch.float32, device), 5
    clean = memory_read(*inputs, top_k=top_k, impl="reference")
    inputs[0][1, 2, 0] = torch.nan
    output = run(inputs, torch.ones_like(inputs[0]), top_k=top_k, impl=impl)["output"]
    assert output[1, 2].isnan().all()
    others = torch.ones(output.shape[:2], dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(output[others], clean[others], **tolerance(torch.float32))
    # A parent that scores NaN counts as the largest, so every token keeps it, also where one is kept.
    inputs = make_inputs(shape, torch.float32, device)
    inputs[1][11] = torch.nan
    assert read(*inputs, top_k=1, impl=impl).isnan().all()


def check_zero_values(
    dtype: torch.dtype,
    device: str = "cpu",
    impl: str = "triton",
    shape: Shape = "paper-like",
    memory_dtype: torch.dtype | None = None,
) -> None:
    x, parent_keys, child_keys, child_values = make_inputs(shape, dtype, device, memory_dtype=memory_dtype)
    output = read(x, parent_keys, child_keys, torch.zeros_like(child_values), top_k=5, impl=impl)
    assert output.dtype == x.dtype
    assert torch.equal(output, x)
    assert output.data_ptr() != x.data_ptr()


def check_layouts(device: str = "cpu", impl: str = "triton") -> None:
    """Strided x, strided memory, a gradient as from a sum; leading dimensions; autocast, for Triton around backward."""

    def under_autocast(*tensors: Tensor, **options: Any) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return read(*tensors, **options)

    _, *memory = make_inputs((1, 20, 16, 3, 8), torch.float32, device)
    memory = [memory[0].T.contiguous().T, *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in memory[1:])]
    wide, swapped = torch.randn(3, 7, 40, device=device), torch.randn(7, 3, 20, device=device).transpose(0, 1)
    for x in (wide[..., ::2], wide[..., 20:], swapped, torch.randn(20, device=device)):
        grad_output = torch.randn([1] * x.ndim, device=device).expand_as(x)
        expected = run([x, *memory], grad_output, top_k=8, impl="reference")
        actual = run([x, *memory], grad_output, top_k=8, impl=impl)
        assert_all_close(actual, expected, **tolerance(torch.float32))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=impl == "triton"):
            actual = run([x, *memory], grad_output, function=under_autocast, top_k=8, impl=impl)
        assert_all_close(actual, expected, **tolerance(torch.float32))


def check_only_needed_gradients(device: str = "cpu", impl: str = "triton", dtype: torch.dtype = torch.float32) -> None:
    inputs = make_inputs("odd", dtype, device)
    grad_output = torch.randn_like(inputs[0])
    expected = run(inputs, grad_output, top_k=4, impl="reference")
    for needed in ((0,), (1,), (2,), (3,), (1, 2, 3), (0, 3)):
        leaves = [tensor.clone().requires_grad_(index in needed) for index, tensor in enumerate(inputs)]
        read(*leaves, top_k=4, impl=impl).backward(grad_output)
        assert [leaf.grad is not None for leaf in leaves] == [index in needed for index in range(4)]
        found = {NAMES[index]: leaves[index].grad for index in needed}
        assert_all_close(found, {name: expected[name] for name in found}, **tolerance(dtype))


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
        expected = run(few, grad_output[:tokens], top_k=4, impl="reference")
        actual = run(few, grad_output[:tokens], function=compiled, top_k=4, impl="triton")
        assert_all_close(actual, expected, **tolerance(torch.float32))


# Mixed batches


def check_mixed(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """Float32 against the loop with the reference; half precision against the float32 loop, as above."""
    inputs, top_k = make_inputs(shape, dtype, device, memories=3), shape[-1]
    index = torch.tensor([2, -1, 0, 2, 2], device=device)  # memory 1 is read by nobody
    grad_output = torch.randn_like(inputs[0])
    exact = [tensor.float() for tensor in inputs]
    options = {"function": memory_read_mixed, "top_k": top_k, "temperature": 0.7}
    expected = run(exact, grad_output.float(), index, impl="reference", **options)
    actual = run(inputs, grad_output, index, impl="triton", **options)
    assert torch.equal(actual["output"][1], inputs[0][1])
    assert torch.equal(actual["x"][1], grad_output[1])
    assert not any(actual[name][1].any() for name in NAMES[1:])
    if dtype == torch.float32:
        assert_all_close(actual, expected, **tolerance(dtype))
        return
    plain = run(inputs, grad_output, index, impl="reference", **options)
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
    mixed = run(inputs, grad_output, index, function=memory_read_mixed, top_k=8, impl="triton")
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
