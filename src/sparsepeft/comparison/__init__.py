"""Methods compared on data of one's own; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.comparison.names import COMPARED
    from sparsepeft.comparison.report import Compared, Comparison
    from sparsepeft.comparison.running import compare

__all__ = ["COMPARED", "Compared", "Comparison", "compare"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.comparison.running": ("compare",),
        "sparsepeft.comparison.names": ("COMPARED",),
        "sparsepeft.comparison.report": ("Compared", "Comparison"),
    },
)
