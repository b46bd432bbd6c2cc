"""Files of any size, answered by any number of tasks in one pass; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.bulk.cluster import RayOptions
    from sparsepeft.bulk.run import BulkReport, score_files

__all__ = ["BulkReport", "RayOptions", "score_files"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.bulk.cluster": ("RayOptions",),
        "sparsepeft.bulk.run": ("BulkReport", "score_files"),
    },
)
