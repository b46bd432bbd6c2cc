"""Modules over :mod:`sparsepeft.ops`: they hold parameters and call one op."""

from sparsepeft.layers.memory import SparseMemory

__all__ = ["SparseMemory"]
