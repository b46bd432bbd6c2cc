"""Functions from tensors to tensors; needs nothing but torch."""

from sparsepeft.ops.load_balancing import load_balancing_loss, routing_load_balancing_loss
from sparsepeft.ops.memory import MemoryChoice, explain_memory_impl, memory_read, memory_read_mixed
from sparsepeft.ops.routed_ffn import (
    LowRank,
    Projection,
    RoutedFFNChoice,
    Routing,
    explain_routed_ffn_impl,
    route,
    routed_ffn,
)
from sparsepeft.ops.sparse_attention import (
    SparseAttentionChoice,
    explain_sparse_attention_impl,
    fit_codebooks,
    refresh_codebooks,
    selection_recall,
    sparse_attention,
)

__all__ = [
    "LowRank",
    "MemoryChoice",
    "Projection",
    "RoutedFFNChoice",
    "Routing",
    "SparseAttentionChoice",
    "explain_memory_impl",
    "explain_routed_ffn_impl",
    "explain_sparse_attention_impl",
    "fit_codebooks",
    "load_balancing_loss",
    "memory_read",
    "memory_read_mixed",
    "refresh_codebooks",
    "route",
    "routed_ffn",
    "routing_load_balancing_loss",
    "selection_recall",
    "sparse_attention",
]
