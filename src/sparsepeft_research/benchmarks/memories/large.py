"""What a token costs as a memory grows: product keys with sparse gradients beside a key for each parent.

    sparsepeft benchmark large_memory --output research/results/benchmarks/large_memory.json

Times are of a forward pass without gradients, of a forward and a backward pass to the hidden states and the whole
memory, and of both with a step of the optimizer: LazyAdamW for sparse gradients, else torch's fused AdamW. Memories of
all sizes are read in turn, so that ratios between them are of the same minutes. Each is checked first: product keys
against the reference where that is not too large, else against plain PyTorch.

The process keeps memory that was freed, as ``sparsepeft train`` does: clearing the pages of fresh gradients would take
longer than computing them.

A flat memory of many parents is only read: its dense gradients and moments alone take five times its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepeft.devices import keep_freed_memory
from sparsepeft.ops import explain, memory_read, product_memory_read
from sparsepeft.training import LazyAdamW
from sparsepeft_research.benchmarks.measuring import Timing, forward_backward, require_agreement, time_alternating
from sparsepeft_research.benchmarks.memory import TOLERANCE
from sparsepeft_research.benchmarks.registry import Progress

# What all sizes are compared with: a flat memory of so many parents, as it is read without any of this.
BASE = 256
# Parents of the largest flat memory that is trained, and of the largest that the reference is run for.
_MAX_TRAINED_FLAT = 4096
_MAX_REFERENCE = 4096
_CHECKED_TOKENS = 16


class Sizes(NamedTuple):
    """Of all cases."""

    num_tokens: int
    hidden_size: int
    num_children: int
    top_k: int
    parents: tuple[int, ...]


FULL = Sizes(2048, 768, 4, 8, (256, 1024, 4096, 16384, 65536))
QUICK = Sizes(64, 32, 2, 4, (256, 1024))


class Memory:
    """One memory, with the tables of children that both kinds of keys share."""

    def __init__(self, kind: str, keys: list[Tensor], children: list[Tensor], top_k: int) -> None:
        self.kind, self.tables = kind, [*keys, *children]
        self.num_parents, self.top_k = len(children[0]), top_k

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.kind} {self.num_parents}"

    def read(self, x: Tensor, *tables: Tensor, impl: str = "auto") -> Tensor:
        """Read it, with sparse gradients for product keys."""
        if self.kind == "flat":
            return memory_read(x, *tables, top_k=self.top_k, impl=impl)
        sparse = impl != "reference"
        return product_memory_read(x, *tables, top_k=self.top_k, sparse_gradients=sparse, impl=impl)

    def stepper(self, x: Tensor, grad_output: Tensor) -> Callable[[], None]:
        """A forward and a backward pass, and a step of the optimizer, which moves nothing."""
        parameters = [torch.nn.Parameter(table) for table in self.tables]
        optimizer = (
            LazyAdamW(parameters, lr=0.0) if self.kind == "product" else torch.optim.AdamW(parameters, 0.0, fused=True)
        )
        leaf = x.detach().requires_grad_()

        def step() -> None:
            self.read(leaf, *parameters).backward(grad_output)
            optimizer.step()
            optimizer.zero_grad()
            leaf.grad = None

        return step


def make_memories(sizes: Sizes, generator: torch.Generator) -> list[Memory]:
    """A memory of each size and kind."""
    normal = partial(torch.randn, generator=generator)
    memories = []
    for num_parents in sizes.parents:
        n, hidden = int(num_parents**0.5), sizes.hidden_size
        children = [normal(num_parents, sizes.num_children, hidden).mul_(0.02) for _ in range(2)]
        halves = [normal(n, width).mul_(0.02) for width in (hidden - hidden // 2, hidden // 2)]
        memories.append(Memory("product", halves, children, sizes.top_k))
        memories.append(Memory("flat", [normal(num_parents, hidden).mul_(0.02)], children, sizes.top_k))
    return memories


def verify(memory: Memory, x: Tensor, grad_output: Tensor) -> float:
    """Compare output and gradients of a few tokens with those of the definition, or of another implementation."""
    few, grads = x[:_CHECKED_TOKENS], grad_output[:_CHECKED_TOKENS]
    impl = "reference" if memory.num_parents <= _MAX_REFERENCE else "torch"
    actual, expected = (
        [
            tensor.coalesce().values() if tensor.is_sparse and impl == "torch" else tensor.to_dense()
            for tensor in forward_backward(partial(memory.read, impl=chosen), [few, *memory.tables], grads)
        ]
        for chosen in ("auto", impl)
    )
    return require_agreement(memory.name, actual, expected, tolerance=TOLERANCE)


def run(*, repeats: int, idle_wait: float, seed: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """Measure all sizes."""
    sizes, keeps = QUICK if quick else FULL, keep_freed_memory()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes.num_tokens, sizes.hidden_size, generator=generator)
    grad_output = torch.randn(sizes.num_tokens, sizes.hidden_size, generator=generator)
    memories = make_memories(sizes, generator)
    errors = {memory.name: verify(memory, x, grad_output) for memory in memories if _is_trained(memory)}
    progress(f"{len(memories)} memories are right, by {max(errors.values()):.1e}")
    timed = partial(time_alternating, repeats=repeats, warm_up=1, idle_wait_s=idle_wait)
    trained = [memory for memory in memories if _is_trained(memory)]
    with torch.no_grad():
        forward = timed({memory.name: partial(memory.read, x, *memory.tables) for memory in memories})
    training = timed(
        {m.name: partial(forward_backward, m.read, [x, *m.tables], grad_output) for m in trained},
    )
    step = timed({memory.name: memory.stepper(x, grad_output) for memory in trained})
    directions = {"forward": forward, "forward_backward": training, "step": step}
    results = [
        {
            **sizes._asdict(),
            "kind": memory.kind,
            "parents": memory.num_parents,
            "parents_read": _count_read(memory, x),
            "chosen": _chosen(memory, x),
            "largest_relative_error": errors.get(memory.name),
            **{name: times[memory.name]._asdict() for name, times in directions.items() if memory.name in times},
            "microseconds_per_token": _each(
                directions, memory, lambda times, name: 1e3 * times[name].median_ms / sizes.num_tokens
            ),
            f"over_flat_{BASE}": _each(
                directions, memory, lambda times, name: times[name].median_ms / times[f"flat {BASE}"].median_ms
            ),
        }
        for memory in memories
    ]
    for one, (direction, timings) in itertools.product(results, directions.items()):
        name = f"{one['kind']} {one['parents']}"
        if name in timings:
            cost = one["microseconds_per_token"][direction]
            over = one[f"over_flat_{BASE}"][direction]
            progress(f"{name}: {direction} {cost:.1f} us a token, {over:.2f} times a flat memory of {BASE} parents")
    return {"results": results, "keeps_freed_memory": keeps}


def _is_trained(memory: Memory) -> bool:
    return memory.kind == "product" or memory.num_parents <= _MAX_TRAINED_FLAT


def _each(
    directions: dict[str, dict[str, Timing]], memory: Memory, figure: Callable[[dict[str, Timing], str], float]
) -> dict[str, float]:
    return {name: figure(times, memory.name) for name, times in directions.items() if memory.name in times}


def _chosen(memory: Memory, x: Tensor) -> str:
    operator = memory_read if memory.kind == "flat" else product_memory_read
    return explain(operator, x, *memory.tables, top_k=memory.top_k).impl


def _count_read(memory: Memory, x: Tensor) -> int | None:
    """How many parents the tokens read; None for flat keys."""
    if memory.kind == "flat":
        return None
    values = memory.tables[-1].detach().requires_grad_()
    memory.read(x, *memory.tables[:-1], values).sum().backward()
    assert values.grad is not None
    return int(values.grad.coalesce().indices().shape[1])
