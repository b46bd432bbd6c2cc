"""The package's methods for PEFT. Importing this module registers them."""

from sparsepeft.tuners._registry import HEAD, SPARTAN, register
from sparsepeft.tuners.head import HeadConfig, HeadModel
from sparsepeft.tuners.spartan import SpartanConfig, SpartanLayer, SpartanModel

register(SPARTAN, SpartanConfig, SpartanModel)
register(HEAD, HeadConfig, HeadModel)

__all__ = ["HeadConfig", "HeadModel", "SpartanConfig", "SpartanLayer", "SpartanModel"]
