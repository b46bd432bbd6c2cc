"""Sparse parameter-efficient fine-tuning of Transformers, native to PEFT.

Importing this package registers its methods with PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know them.
"""

from __future__ import annotations

__version__ = "0.1.0"

from sparsepeft.spt import SptConfig, desparsify, load_sparse, sparsify
from sparsepeft.tuners import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig, load_adapterhub

__all__ = [
    "BitFitConfig",
    "BottleneckConfig",
    "HeadConfig",
    "SpartanConfig",
    "SptConfig",
    "__version__",
    "desparsify",
    "load_adapterhub",
    "load_sparse",
    "sparsify",
]
