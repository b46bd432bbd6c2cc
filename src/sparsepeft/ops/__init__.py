"""Functions from tensors to tensors; needs nothing but torch."""

from sparsepeft.ops.dropout import CompiledDropout
from sparsepeft.ops.linear_cross_entropy import linear_cross_entropy
from sparsepeft.ops.load_balancing import (
    load_balancing_loss,
    product_load_balancing_loss,
    routing_load_balancing_loss,
)
from sparsepeft.ops.memory import memory_read, memory_read_mixed
from sparsepeft.ops.product_memory import product_memory_read
from sparsepeft.ops.registry import Explanation, explain
from sparsepeft.ops.routed_ffn import LowRank, Projection, Routing, exact_ffn, route, routed_ffn
from sparsepeft.ops.sparse_attention import fit_codebooks, refresh_codebooks, selection_recall, sparse_attention

__all__ = [
    "CompiledDropout",
    "Explanation",
    "LowRank",
    "Projection",
    "Routing",
    "exact_ffn",
    "explain",
    "fit_codebooks",
    "linear_cross_entropy",
    "load_balancing_loss",
    "memory_read",
    "memory_read_mixed",
    "product_load_balancing_loss",
    "product_memory_read",
    "refresh_codebooks",
    "route",
    "routed_ffn",
    "routing_load_balancing_loss",
    "selection_recall",
    "sparse_attention",
]
