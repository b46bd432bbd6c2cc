"""Modules over :mod:`sparsepeft.ops`, and the baselines' own."""

from sparsepeft.layers.bottleneck import BottleneckAdapter
from sparsepeft.layers.memory import SparseMemory

__all__ = ["BottleneckAdapter", "SparseMemory"]
