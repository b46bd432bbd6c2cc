"""Functions from tensors to tensors; needs nothing but torch."""

from sparsepeft.ops.memory import MemoryChoice, explain_memory_impl, memory_read

__all__ = ["MemoryChoice", "explain_memory_impl", "memory_read"]
