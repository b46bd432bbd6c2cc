"""Building the model that a run trains."""

from sparsepeft.methods.models import extend, load_backbone

__all__ = ["extend", "load_backbone"]
