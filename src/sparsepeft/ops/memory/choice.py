"""Which implementation reads a memory, and which of PyTorch's two forms.

The dense form multiplies with the whole memory, the selected form only with the children of a token's K parents. With
gradients, or on a GPU, a rule compares the work per token of both, in products with a vector of size D; scoring the
parents is common to both and left out. The constants reproduce the crossover measured on a 2-core x86 in float32 at
D=768, K=8: P between 64 and 128 for C=3, between 16 and 32 for C=32; they were checked at K=1, 2 and 16 with C=1 to
32. Neither D nor, from one token to thousands, the number of tokens moves the crossover much: the rule leaves them
out, so that a traced graph is chosen as the eager call is.

On a CPU the compiled kernels are measured against these on the machine itself, once: without gradients against both
forms; with gradients, where the kernel multiplies with the whole memory too, against the dense form, where the rule
prefers that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.ops import gpu
from sparsepeft.ops.measured import fastest
from sparsepeft.ops.memory.cpu import memory_read_cpu, why_not_built
from sparsepeft.ops.memory.cpu_training import memory_read_training
from sparsepeft.ops.memory.pytorch import memory_read_dense, memory_read_gathered
from sparsepeft.ops.memory.pytorch_selected import memory_read_selected
from sparsepeft.ops.native import may_replace_call
from sparsepeft.ops.registry import DISABLED, Implementation, Operator

# Columns of a Triton tile of scores, both sizes padded: up to here its registers are known not to spill.
_MAX_TILE_COLUMNS = 512
# A child's key and value read through the grouped, smaller products of the selected form: dense work is 2.
_SELECTED_CHILD_WORK = 3
# Gathering a token's vector for one parent and adding back what that parent read.
_SELECTED_PAIR_WORK = 80
# On a GPU the selected form is many small kernels, and the host waits for the counts: on an H200 in bfloat16 the dense
# form was 5 to 10 times as fast wherever it had up to 46 times the work, and 1.4 times as fast at 186 times
# (research/results/benchmarks/memory_gpu.json). Beyond, it is the memory that the dense form needs that counts.
_SELECTED_ON_GPU = 100
# torch.export: keys and values of each selected child are gathered, nothing is shared between tokens. Measured with
# 256 tokens and K=8: even at about 350 parents, for C=3 and for C=32.
_GATHERED_CHILD_WORK = 100
# Numbers of tokens are measured by class, at its largest member: time per token settles from hundreds on.
_TOKEN_CLASSES = (1, 4, 16, 64, 256, 1024)
# Products of a vector with the memory, tokens times cells, that a measurement may take: some milliseconds a call.
_MEASURED_PRODUCTS = 1 << 18
# With gradients a call takes three times as long, and of a large memory with fewer tokens it would be the wrong ones.
_TRAINED_PRODUCTS = 1 << 20


class MemoryArguments(NamedTuple):
    """What the choice depends on: hidden states and one memory, or a stack of them; see :func:`memory_read`."""

    x: Tensor
    parent_keys: Tensor
    child_keys: Tensor  # (..., P, C, D)
    child_values: Tensor
    top_k: int

    @classmethod
    def bind(
        cls, x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, *, top_k: int, **_: Any
    ) -> MemoryArguments:
        """Take the arguments of :func:`memory_read`."""
        return cls(x, parent_keys, child_keys, child_values, top_k)


def memory_read_torch(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by the form of plain PyTorch that is the fastest; see :func:`memory_read`."""
    form = _choose_form(MemoryArguments(x, parent_keys, child_keys, child_values, top_k))
    return form(x, parent_keys, child_keys, child_values, top_k, temperature)


def read_compiled(
    x: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, top_k: int, temperature: float
) -> Tensor:
    """Read the memory by the compiled kernel without, or that with gradients; see :func:`memory_read`."""
    needs_gradients = _needs_gradients(MemoryArguments(x, parent_keys, child_keys, child_values, top_k))
    read = memory_read_training if needs_gradients else memory_read_cpu
    return read(x, parent_keys, child_keys, child_values, top_k, temperature)


_FORMS: dict[str, Callable[..., Tensor]] = {
    "cpu": read_compiled,
    "dense": memory_read_dense,
    "selected": memory_read_selected,
}


def _choose_form(arguments: MemoryArguments) -> Callable[..., Tensor]:
    exporting = torch.compiler.is_exporting()
    if _is_plain(arguments) and not _needs_gradients(arguments):
        return _FORMS[next(name for name in _measured_times(arguments) if name != "cpu")]
    num_parents, num_children = arguments.child_keys.shape[-3:-1]
    dense = 2 * num_parents * num_children
    if exporting:
        gathered = _GATHERED_CHILD_WORK * arguments.top_k * num_children
        return memory_read_gathered if gathered < dense else memory_read_dense
    selected = arguments.top_k * (_SELECTED_CHILD_WORK * num_children + _SELECTED_PAIR_WORK)
    if arguments.x.is_cuda:
        selected *= _SELECTED_ON_GPU
    return memory_read_selected if selected < dense else memory_read_dense


# Triton


def padded_sizes(num_parents: int, num_children: int) -> tuple[int, int]:
    """Return the parents and children of a Triton tile: powers of two, and 16 parents at least.

    16 is the least that a matrix unit takes. No bit tricks: the sizes may be symbolic.
    """
    parents, children = 16, 1
    while parents < num_parents:
        parents *= 2
    while children < num_children:
        children *= 2
    return parents, children


def _why_not_triton(arguments: MemoryArguments) -> str | None:
    reason = gpu.why_not_triton(*arguments[:4])
    if reason is not None:
        return reason
    num_parents, num_children = arguments.child_keys.shape[-3:-1]
    parents, children = padded_sizes(num_parents, num_children)
    if parents * children > _MAX_TILE_COLUMNS:
        return f"P and C, padded to powers of two, are too many for a tile: P * C may be {_MAX_TILE_COLUMNS}"
    return None


def _why_not_triton_by_itself(arguments: MemoryArguments) -> str | None:
    if torch.compiler.is_exporting():
        return "an exported graph has no operators of our own"
    return gpu.why_not_triton_by_itself(arguments.x)


# Compiled kernels


def _is_plain(arguments: MemoryArguments) -> bool:
    """Whether products are taken in float32 on a CPU, outside of a graph and of forward-mode differentiation."""
    tensors = arguments[:4]
    return may_replace_call(*tensors) and common_dtype(*tensors) == torch.float32


def _needs_gradients(arguments: MemoryArguments) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:4])


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which products of these tensors are taken."""
    first, *others = {tensor.dtype for tensor in tensors}
    return functools.reduce(torch.promote_types, others, first)


def _why_not_cpu(arguments: MemoryArguments) -> str | None:
    if _is_plain(arguments):
        return None
    return "the compiled kernels read plain float32 tensors on a CPU, outside of traced graphs"


def _why_slower(arguments: MemoryArguments) -> str | None:
    if _needs_gradients(arguments) and _choose_form(arguments) is memory_read_selected:
        return "with gradients it multiplies with the whole memory, of which K parents are too small a part here"
    times = _measured_times(arguments)
    if next(iter(times)) == "cpu":
        return None
    listed = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items())
    return f"it was measured to be slower on this machine with {torch.get_num_threads()} threads ({listed})"


def _measured_times(arguments: MemoryArguments) -> dict[str, float]:
    """Return the milliseconds of each form, the fastest first, for about so many tokens; see :func:`fastest`."""
    num_parents, num_children, hidden = arguments.child_keys.shape[-3:]
    num_tokens = arguments.x.numel() // hidden
    token_class = next((size for size in _TOKEN_CLASSES if num_tokens <= size), _TOKEN_CLASSES[-1])
    sizes = token_class, hidden, num_parents, num_children, arguments.top_k
    return _times(*sizes, arguments.x.dtype, _needs_gradients(arguments), torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _times(
    num_tokens: int,
    hidden: int,
    num_parents: int,
    num_children: int,
    top_k: int,
    dtype: torch.dtype,
    trains: bool,
    threads: int,
) -> dict[str, float]:
    forms = ["dense"]
    if num_parents > top_k and not trains:  # with all parents there is nothing to leave out
        forms.append("selected")
    if "cpu" not in DISABLED and why_not_built() is None:
        forms.append("cpu")
    key = num_tokens, hidden, num_parents, num_children, top_k, str(dtype)
    products = _TRAINED_PRODUCTS if trains else _MEASURED_PRODUCTS
    measured_tokens = max(1, min(num_tokens, products // (num_parents * (1 + 2 * num_children))))
    generator = torch.Generator().manual_seed(0)
    shapes = (measured_tokens,), (num_parents,), (num_parents, num_children), (num_parents, num_children)
    x, *memory = (
        torch.randn(*shape, hidden, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes
    )
    tensors = [tensor.requires_grad_(trains) for tensor in (x.to(dtype), *memory)]
    calls = {name: functools.partial(_train if trains else _read, name, tensors, top_k) for name in forms}
    with torch.set_grad_enabled(trains):
        return fastest("memory_train" if trains else "memory_read", key, calls)


def _read(name: str, tensors: list[Tensor], top_k: int) -> Tensor:
    """Read as :func:`memory_read` does: only the compiled kernels take bfloat16 as it is."""
    x, *memory = tensors
    tokens = x if name == "cpu" and x.dtype == torch.bfloat16 else x.to(torch.float32)
    return _FORMS[name](tokens, *memory, top_k, 1.0).to(x.dtype)


def _train(name: str, tensors: list[Tensor], top_k: int) -> None:
    output = _read(name, tensors, top_k)
    torch.autograd.grad(output, tensors, output.detach())


OPERATOR = Operator(
    "memory_read",
    MemoryArguments.bind,
    [
        Implementation("reference", 0, "the definition"),
        Implementation("torch", 10, "runs everywhere: densely, or by the selected parents where that is less"),
        Implementation(
            "cpu",
            20,
            "it was measured to be the fastest on this machine",
            why_unavailable=why_not_built,
            why_not=_why_not_cpu,
            why_not_automatic=_why_slower,
        ),
        Implementation(
            "triton",
            30,
            "one kernel reads the hidden states once and writes them once",
            why_unavailable=gpu.why_no_triton,
            why_not=_why_not_triton,
            why_not_automatic=_why_not_triton_by_itself,
        ),
    ],
)
