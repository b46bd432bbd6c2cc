"""SPARTAN as a PEFT method."""

from sparsepeft.tuners.spartan.config import SpartanConfig
from sparsepeft.tuners.spartan.layer import SpartanLayer
from sparsepeft.tuners.spartan.model import SpartanModel

__all__ = ["SpartanConfig", "SpartanLayer", "SpartanModel"]
