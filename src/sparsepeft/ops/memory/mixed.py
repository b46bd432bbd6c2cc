"""Mixed batches as a loop over memories: the specification of the fused form, and what runs where there is none."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Read = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def read_memory_by_memory(
    x: Tensor, memory_index: Tensor, parent_keys: Tensor, child_keys: Tensor, child_values: Tensor, read: Read
) -> Tensor:
    """Let the rows of each memory read it with ``read(rows, parent_keys, child_keys, child_values)``.

    Shapes as for :func:`memory_read_mixed`. It looks which memories occur, and so waits for a GPU.
    """
    output = x.clone()
    for memory in memory_index.unique().tolist():
        if memory >= 0:
            rows = (memory_index == memory).nonzero()[:, 0]
            one_read = read(x[rows], parent_keys[memory], child_keys[memory], child_values[memory])
            output = output.index_copy(0, rows, one_read)
    return output
