"""Which form reads a memory fastest without gradients on this CPU: measured, not guessed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparsepeft.ops.measured import fastest
from sparsepeft.ops.memory.compiled import memory_read_compiled, why_not_built
from sparsepeft.ops.memory.masked import memory_read_masked
from sparsepeft.ops.memory.selected import memory_read_selected

# Numbers of tokens are measured by class, at its largest member: time per token settles from hundreds on.
_CLASSES = (1, 4, 16, 64, 256, 1024)
# Products of a vector with the memory, tokens times cells, that a measurement may take: some milliseconds a call.
_MEASURED_PRODUCTS = 1 << 18
_FORMS: dict[str, Callable[..., Tensor]] = {
    "cpu": memory_read_compiled,
    "masked": memory_read_masked,
    "selected": memory_read_selected,
}


def inference_times(
    num_tokens: int, hidden_size: int, num_parents: int, num_children: int, top_k: int, dtype: torch.dtype
) -> dict[str, float]:
    """Return the milliseconds of each form, the fastest first, for about so many tokens; see :func:`fastest`.

    ``dtype`` is that of the hidden states, float32 or bfloat16; the memory is float32.
    """
    largest = next((size for size in _CLASSES if num_tokens <= size), _CLASSES[-1])
    return _times(largest, hidden_size, num_parents, num_children, top_k, dtype, torch.get_num_threads())


@functools.lru_cache(maxsize=1024)
def _times(
    num_tokens: int, hidden: int, num_parents: int, num_children: int, top_k: int, dtype: torch.dtype, threads: int
) -> dict[str, float]:
    if why_not_built() is not None:
        forms = ["masked", "selected"]
    elif num_parents == top_k:
        forms = ["cpu", "masked"]  # nothing is left out
    else:
        forms = list(_FORMS)
    key = num_tokens, hidden, num_parents, num_children, top_k, str(dtype)
    measured_tokens = max(1, min(num_tokens, _MEASURED_PRODUCTS // (num_parents * (1 + 2 * num_children))))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        shapes = (measured_tokens,), (num_parents,), (num_parents, num_children), (num_parents, num_children)
        x, *memory = (
            torch.randn(*shape, hidden, generator=generator, dtype=torch.float32, device="cpu") for shape in shapes
        )
        calls = {name: functools.partial(_read, name, x.to(dtype), memory, top_k) for name in forms}
        return fastest("memory_read", key, calls)


def _read(name: str, x: Tensor, memory: list[Tensor], top_k: int) -> Tensor:
    """Read as :func:`memory_read` does: only the compiled form takes bfloat16 as it is."""
    tokens = x if name == "cpu" and x.dtype == torch.bfloat16 else x.to(torch.float32)
    return _FORMS[name](tokens, *memory, top_k, 1.0).to(x.dtype)
