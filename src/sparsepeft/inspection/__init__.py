"""What the parent cells of a trained SPARTAN memory have learned."""

from sparsepeft.inspection.collect import find_memories, inspect_memories
from sparsepeft.inspection.labels import quantile_edges
from sparsepeft.inspection.reading import LayerReading, TextReading, read_text
from sparsepeft.inspection.report import LayerReport, MemoryReport, ParentReport, WordReport
from sparsepeft.inspection.run import inspect_run
from sparsepeft.inspection.words import Words, encode_with_words, token_words

__all__ = [
    "LayerReading",
    "LayerReport",
    "MemoryReport",
    "ParentReport",
    "TextReading",
    "WordReport",
    "Words",
    "encode_with_words",
    "find_memories",
    "inspect_memories",
    "inspect_run",
    "quantile_edges",
    "read_text",
    "token_words",
]
