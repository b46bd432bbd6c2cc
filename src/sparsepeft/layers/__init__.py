"""Modules over :mod:`sparsepeft.ops`, and the baselines' own."""

from sparsepeft.layers.bottleneck import BottleneckAdapter
from sparsepeft.layers.memory import SparseMemory
from sparsepeft.layers.product_memory import ProductKeyMemory

__all__ = ["BottleneckAdapter", "ProductKeyMemory", "SparseMemory"]
