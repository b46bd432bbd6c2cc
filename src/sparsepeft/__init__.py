"""Sparse parameter-efficient fine-tuning of Transformers, native to PEFT.

Importing this package registers its methods with PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know them.
"""

from __future__ import annotations

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from sparsepeft.spt import SptConfig, desparsify, load_sparse, sparsify
from sparsepeft.tuners import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig, load_adapterhub

if TYPE_CHECKING:
    from sparsepeft.engine import MultiTaskEngine

__all__ = [
    "BitFitConfig",
    "BottleneckConfig",
    "HeadConfig",
    "MultiTaskEngine",
    "SpartanConfig",
    "SptConfig",
    "__version__",
    "desparsify",
    "load_adapterhub",
    "load_sparse",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    # The engine reads run folders, and with them loads libraries that adapters alone do not need.
    if name == "MultiTaskEngine":
        from sparsepeft.engine import MultiTaskEngine

        return MultiTaskEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
