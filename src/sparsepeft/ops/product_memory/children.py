"""The second level of a large memory: each token reads the children of its own parents, and gradients touch no other.

Nothing here depends on how the parents were found. The gradients of keys and values are dense tensors, or sparse ones
that hold the rows of the parents that were read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsepeft.ops.memory.pytorch import read_gathered
from sparsepeft.ops.numerics import softmax_dtype


class Read(NamedTuple):
    """What a token reads: N tokens, K parents each.

    Attributes:
        x: hidden states, (N, D).
        gate: the parents' weights, (N, K), in the dtype of softmaxes.
        parents: which they are, (N, K), 64 bits wide.
        child_keys, child_values: (P, C, D), in the dtype of ``x``.
        temperature: divides the children's scores.
    """

    x: Tensor
    gate: Tensor
    parents: Tensor
    child_keys: Tensor
    child_values: Tensor
    temperature: float


class Pairs(NamedTuple):
    """The pairs of token and parent of a read, sorted by parent, U of which occur.

    Attributes:
        order: token * K + slot, (N * K,).
        touched: the parents that occur, ascending, (U,).
        counts: the pairs of each, (U,).
        rows: where each one's gradients go, (U,).
    """

    order: Tensor
    touched: Tensor
    counts: Tensor
    rows: Tensor


class Form(NamedTuple):
    """An implementation.

    Attributes:
        read: gives the states after the read, (N, D), and each parent's softmax over its children, (N, K, C).
        differentiate: of a read, that softmax and the output's gradient, gives those of x and of the gate and, where
            there are pairs, of keys and values, (rows, C, D).
    """

    read: Callable[[Read], tuple[Tensor, Tensor]]
    differentiate: Callable[[Read, Tensor, Tensor, Pairs | None, int], tuple[Tensor, ...]]


def read_children(read: Read, form: Form, sparse: bool) -> Tensor:
    """Return the states after the read, (N, D).

    Args:
        form: how it is computed.
        sparse: let the gradients of keys and values be sparse tensors, coalesced, with one row for each parent read.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read[:2] + read[3:5]):
        return _read_with_gradients(read, form, sparse)
    return form.read(read)[0]


@torch.compiler.disable  # sparse tensors and compiled kernels are no part of a traced graph
def _read_with_gradients(read: Read, form: Form, sparse: bool) -> Tensor:
    x, gate, parents, child_keys, child_values, temperature = read
    output: Tensor = _Read.apply(x, gate, child_keys, child_values, parents, temperature, form, sparse)
    return output


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        child_keys: Tensor,
        child_values: Tensor,
        parents: Tensor,
        temperature: float,
        form: Form,
        sparse: bool,
    ) -> Tensor:
        output, attention = form.read(Read(x, gate, parents, child_keys, child_values, temperature))
        ctx.save_for_backward(x, gate, parents, child_keys, child_values, attention)
        ctx.temperature, ctx.form, ctx.sparse = temperature, form, sparse
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, parents, child_keys, child_values, attention = ctx.saved_tensors
        read = Read(x, gate, parents, child_keys, child_values, ctx.temperature)
        pairs = sort_pairs(read.parents, ctx.sparse) if any(ctx.needs_input_grad[2:4]) else None
        num_rows = 0 if pairs is None else len(pairs.touched) if ctx.sparse else len(read.child_keys)
        found = ctx.form.differentiate(read, attention, grads[0].contiguous(), pairs, num_rows)
        if pairs is not None and ctx.sparse:
            found = *found[:2], *(_as_sparse(rows, pairs.touched, read.child_keys.shape) for rows in found[2:])
        wanted = zip(found, ctx.needs_input_grad, strict=False)  # without pairs the first two alone
        needed = [gradient if need else None for gradient, need in wanted]
        return *needed, *[None] * (8 - len(needed))


def sort_pairs(parents: Tensor, sparse: bool) -> Pairs:
    """Group the pairs of a selection, (N, K), by parent; the rows of dense gradients are the parents themselves."""
    by_parent, order = parents.flatten().sort(stable=True)
    touched, counts = by_parent.unique_consecutive(return_counts=True)
    return Pairs(order, touched, counts, torch.arange(len(touched), device=parents.device) if sparse else touched)


def _as_sparse(rows: Tensor, touched: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(touched.unsqueeze(0), rows, shape, is_coalesced=True, check_invariants=False)


def differentiate_gathered(
    read: Read, attention: Tensor, grad_output: Tensor, pairs: Pairs | None, num_rows: int
) -> tuple[Tensor, ...]:
    """The gradients in plain PyTorch, one selected parent of each token after the other.

    With a_c = G . v_c and u = sum_c attention_c a_c: dv_c = g attention_c G;
    ds_c = g attention_c (a_c - u) / temperature; dg = u.
    """
    x, gate, parents, child_keys, child_values, temperature = read
    precise = softmax_dtype(x.dtype)
    grad_x, grad_gate = grad_output.to(precise, copy=True), torch.empty_like(gate)
    grad_cells: list[Tensor] = []
    if pairs is not None:
        grad_cells = [x.new_zeros((num_rows, *child_keys.shape[1:]), dtype=precise) for _ in range(2)]
        rows = torch.empty_like(parents).flatten()
        rows[pairs.order] = pairs.rows.repeat_interleave(pairs.counts)
        rows = rows.view_as(parents)
    for rank in range(parents.shape[1]):  # one at a time: the largest temporary is (N, C, D)
        kept = parents[:, rank]
        agreement = torch.matmul(child_values[kept], grad_output.unsqueeze(-1)).squeeze(-1).to(precise)  # a, (N, C)
        grad_gate[:, rank] = (attention[:, rank] * agreement).sum(-1)  # u
        weights = gate[:, rank : rank + 1] * attention[:, rank]
        grad_scores = weights * (agreement - grad_gate[:, rank : rank + 1]) / temperature
        grad_x += torch.matmul(grad_scores.to(x.dtype).unsqueeze(1), child_keys[kept]).squeeze(1)
        for total, of_cell, vectors in zip(grad_cells, (grad_scores, weights), (x, grad_output), strict=False):
            total.index_add_(0, rows[:, rank], of_cell.unsqueeze(-1) * vectors.to(precise).unsqueeze(1))
    return grad_x.to(x.dtype), grad_gate, *(total.to(child_keys.dtype) for total in grad_cells)


def _read_gathered(read: Read) -> tuple[Tensor, Tensor]:
    return read_gathered(*read)


GATHERED = Form(_read_gathered, differentiate_gathered)
