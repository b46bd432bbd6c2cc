"""Bottleneck adapters (Pfeiffer, Houlsby) as a PEFT method."""

from sparsepeft.tuners.bottleneck.adapterhub import load_adapterhub
from sparsepeft.tuners.bottleneck.config import BottleneckConfig
from sparsepeft.tuners.bottleneck.layer import BottleneckLayer
from sparsepeft.tuners.bottleneck.model import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel", "load_adapterhub"]
