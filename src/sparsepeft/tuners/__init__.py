"""This package's methods for PEFT. Importing this module registers them."""

from sparsepeft.tuners._registry import SPARTAN, register
from sparsepeft.tuners.spartan import SpartanConfig, SpartanLayer, SpartanModel

register(SPARTAN, SpartanConfig, SpartanModel)

__all__ = ["SpartanConfig", "SpartanLayer", "SpartanModel"]
