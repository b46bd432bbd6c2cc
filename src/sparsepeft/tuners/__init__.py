"""The package's methods for PEFT. Importing this module registers them."""

from sparsepeft.tuners.adapterhub import load_adapterhub
from sparsepeft.tuners.bitfit import BitFitConfig, BitFitModel
from sparsepeft.tuners.bottleneck import BottleneckConfig, BottleneckModel
from sparsepeft.tuners.config import BITFIT, BOTTLENECK, HEAD, SPARTAN, register
from sparsepeft.tuners.head import HeadConfig, HeadModel
from sparsepeft.tuners.spartan import SpartanConfig, SpartanModel

register(SPARTAN, SpartanConfig, SpartanModel)
register(BOTTLENECK, BottleneckConfig, BottleneckModel)
register(BITFIT, BitFitConfig, BitFitModel)
register(HEAD, HeadConfig, HeadModel)

__all__ = [
    "BitFitConfig",
    "BitFitModel",
    "BottleneckConfig",
    "BottleneckModel",
    "HeadConfig",
    "HeadModel",
    "SpartanConfig",
    "SpartanModel",
    "load_adapterhub",
]
