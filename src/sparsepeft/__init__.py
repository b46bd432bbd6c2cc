"""Sparse parameter-efficient fine-tuning of Transformers, native to PEFT.

Importing this package registers its methods with PEFT, after which ``get_peft_model`` and
``PeftModel.from_pretrained`` know them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from sparsepeft.tuners import SpartanConfig, SpartanModel

__all__ = ["SpartanConfig", "SpartanModel", "__version__"]
