"""Sparse parameter-efficient fine-tuning of Transformers, native to PEFT.

Importing this package makes its methods known to PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know them. What it exports is loaded when it is first asked for, so that the import itself
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import sparsepeft_autoload

if TYPE_CHECKING:
    from sparsepeft.engine import MultiTaskEngine
    from sparsepeft.spt import SptConfig, desparsify, load_sparse, sparsify
    from sparsepeft.tuners import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig, load_adapterhub

__version__ = "0.1.0"
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
_MODULES = {
    "sparsepeft.engine": ("MultiTaskEngine",),
    "sparsepeft.spt": ("SptConfig", "desparsify", "load_sparse", "sparsify"),
    "sparsepeft.tuners": ("BitFitConfig", "BottleneckConfig", "HeadConfig", "SpartanConfig", "load_adapterhub"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

sparsepeft_autoload.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
