"""What a memory reads at each position, and running counts of what its parents are picked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsepeft.layers import SparseMemory
from sparsepeft.ops.numerics import softmax_dtype

# Positions are read so many at a time that the scores of their parents and children have at most this many entries.
_ENTRIES = 1 << 22


class Picks:
    """Counts over positions and documents (rows of a batch), in memory that does not grow with their number.

    Args:
        num_classes: L, the number of labels; 0 without labels.

    Attributes:
        positions: positions counted.
        first, picked: how often each parent had the highest weight, and was among the K picked, (P,).
        gates, moved: sums of each parent's weight and of what it adds relative to the state, where picked, (P,).
        children: how often each child was picked most where its parent came first, (P, C).
        entropy, moved_total: sums over positions of the K weights' entropy and of the whole relative update.
        labelled_positions: labels of the positions at which each parent came first, (P, L).
        documents: documents of each parent, (P,).
        known_documents: those of them of which the labels are known, (P,).
        labelled_documents: their labels, (P, L).
    """

    def __init__(self, memory: SparseMemory, num_classes: int) -> None:
        num_parents, num_children, _ = memory.child_keys.shape
        self.memory = memory
        self.positions = 0
        self.first, self.picked, self.documents, self.known_documents = (
            np.zeros(num_parents, dtype=np.int64) for _ in range(4)
        )
        self.gates, self.moved = np.zeros(num_parents), np.zeros(num_parents)
        self.children = np.zeros((num_parents, num_children), dtype=np.int64)
        self.entropy = self.moved_total = 0.0
        self.labelled_positions, self.labelled_documents = (
            np.zeros((num_parents, num_classes), dtype=np.int64) for _ in range(2)
        )
        self._row_first = self._row_gates = np.zeros((0, num_parents))

    def add(self, states: torch.Tensor, rows: np.ndarray, num_rows: int, classes: np.ndarray) -> np.ndarray:
        """Count positions; called once for each time the memory is read in a forward pass.

        Args:
            states: the states at the positions that count, (N, D).
            rows: the document each belongs to, (N,).
            num_rows: B, documents in the batch.
            classes: the label of each position, (N,), negative where it has none; or ones and zeros, (N, L), where it
                has those of its document, which may be several.

        Returns:
            The parent with the highest weight at each position, (N,).
        """
        num_parents = len(self.first)
        if len(self._row_first) != num_rows:
            self._row_first = np.zeros((num_rows, num_parents), dtype=np.int64)
            self._row_gates = np.zeros((num_rows, num_parents))
        firsts = []
        for part, reading in read(self.memory, states):
            parents, gates, children, moved, total = (t.cpu().numpy() for t in reading)
            gates, moved, first = gates.astype(np.float64), moved.astype(np.float64), parents[:, 0]
            self.positions += len(parents)
            self.first += np.bincount(first, minlength=num_parents)
            self.picked += np.bincount(parents.ravel(), minlength=num_parents)
            self.gates += np.bincount(parents.ravel(), gates.ravel(), minlength=num_parents)
            self.moved += np.bincount(parents.ravel(), moved.ravel(), minlength=num_parents)
            np.add.at(self.children, (first, children[:, 0]), 1)
            self.entropy -= float((gates * np.log(np.maximum(gates, np.finfo(gates.dtype).tiny))).sum())
            self.moved_total += float(total.sum(dtype=np.float64))
            _count(self.labelled_positions, first, classes[part])
            np.add.at(self._row_first, (rows[part], first), 1)
            np.add.at(self._row_gates, (rows[part][:, None], parents), gates)
            firsts.append(first)
        return np.concatenate(firsts) if firsts else np.zeros(0, dtype=np.int64)

    def finish_batch(self, classes: np.ndarray) -> None:
        """Give each document of the batch to the parent that came first most often in it.

        Of equally frequent parents the one with the higher total weight in the document wins, then the lower index.

        Args:
            classes: the label of each document, (B,), negative where it has none; or ones and zeros, (B, L).
        """
        counted = self._row_first.sum(1) > 0
        most = self._row_first == self._row_first.max(1, keepdims=True)
        parents = np.where(most, self._row_gates, -np.inf).argmax(1)
        self.documents += np.bincount(parents[counted], minlength=len(self.documents))
        if len(classes) == len(parents):
            known = _count(self.labelled_documents, parents[counted], classes[counted])
            self.known_documents += np.bincount(known, minlength=len(self.documents))
        self._row_first, self._row_gates = self._row_first[:0], self._row_gates[:0]


def _count(counts: np.ndarray, parents: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Add the labels of what went to ``parents``, (N,), to the counts, (P, L); the parents of what has known labels."""
    if classes.ndim == 2:
        np.add.at(counts, parents, classes)
        return parents
    known = classes >= 0
    np.add.at(counts, (parents[known], classes[known]), 1)
    return parents[known]


class Reading(NamedTuple):
    """What N positions read from a memory; K parents each, the one with the highest score first.

    Attributes:
        parents: the parents picked, (N, K).
        gates: their renormalised weights, (N, K).
        children: the child picked most under each, (N, K).
        moved: the norm of what each adds, over the norm of the state, (N, K).
        moved_total: the norm of what all add together, over the norm of the state, (N,).
    """

    parents: Tensor
    gates: Tensor
    children: Tensor
    moved: Tensor
    moved_total: Tensor


def read(memory: SparseMemory, states: Tensor) -> Iterator[tuple[slice, Reading]]:
    """How ``memory`` is read by ``states``, a bounded number of them at a time.

    Args:
        states: the hidden states it is read with, (N, D).

    Yields:
        Which rows, and their :class:`Reading`.
    """
    num_parents, num_children, _ = memory.child_keys.shape
    rows = max(1, _ENTRIES // max(num_parents, memory.top_k * num_children))
    for start in range(0, len(states), rows):
        yield slice(start, start + rows), _read(memory, states[start : start + rows])


def _read(memory: SparseMemory, states: Tensor) -> Reading:
    # The dtypes of ops.memory_read: products in the common dtype, softmaxes in float32 at least.
    dtype = torch.promote_types(states.dtype, memory.child_keys.dtype)
    x, child_keys, child_values = (tensor.to(dtype) for tensor in (states, memory.child_keys, memory.child_values))
    precise = softmax_dtype(dtype)
    scores, parents = memory.select(states)
    # By index, then stably by score: of equal scores the lowest index comes first.
    by_index = parents.argsort(-1)
    order = by_index.gather(-1, scores.gather(-1, by_index).argsort(dim=-1, descending=True, stable=True))
    scores, parents = scores.gather(-1, order), parents.gather(-1, order)
    gates = torch.softmax(scores, dim=-1)

    children, moved = torch.zeros_like(parents), torch.zeros_like(gates)
    total = torch.zeros(x.shape, dtype=precise, device=x.device)
    pairs = parents.flatten().argsort(stable=True)  # position * K + slot, grouped by parent
    for group in pairs.split(parents.flatten().bincount(minlength=memory.num_parents).tolist()):
        if not len(group):
            continue
        parent, positions = parents.flatten()[group[0]], group // memory.top_k
        attention = torch.softmax((x[positions] @ child_keys[parent].T).to(precise) / memory.temperature, dim=-1)
        added = gates.flatten()[group, None] * (attention @ child_values[parent].to(precise))
        children.view(-1)[group] = attention.argmax(-1)
        moved.view(-1)[group] = added.norm(dim=-1)
        total.index_add_(0, positions, added)
    norms = x.to(precise).norm(dim=-1).clamp_min(torch.finfo(precise).tiny)
    return Reading(parents, gates, children, moved / norms[:, None], total.norm(dim=-1) / norms)
