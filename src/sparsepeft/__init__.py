"""Sparse parameter-efficient fine-tuning of Transformers, native to PEFT.

Importing this package makes its methods known to PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know them. What it exports is loaded when it is first asked for, so that the import itself
costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sparsepeft_autoload
from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.inference import MultiTaskEngine
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

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.inference": ("MultiTaskEngine",),
        "sparsepeft.spt": ("SptConfig", "desparsify", "load_sparse", "sparsify"),
        "sparsepeft.tuners": ("BitFitConfig", "BottleneckConfig", "HeadConfig", "SpartanConfig", "load_adapterhub"),
    },
)
sparsepeft_autoload.install()
