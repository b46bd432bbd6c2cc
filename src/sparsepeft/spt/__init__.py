"""Sparse fine-tuning (SPT): sparse attention and sparse FFNs in transformers' models."""

from sparsepeft.planning import Plan
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import Sparsification, desparsify, sparsification
from sparsepeft.spt.density import answering, labelled
from sparsepeft.spt.loading import load_sparse, save_sparse
from sparsepeft.spt.report import SptReport
from sparsepeft.spt.sparsifying import sparsify

__all__ = [
    "Plan",
    "Sparsification",
    "SptConfig",
    "SptReport",
    "answering",
    "desparsify",
    "labelled",
    "load_sparse",
    "save_sparse",
    "sparsification",
    "sparsify",
]
