"""Building the model that a run trains, by the names' former place, which programs import them from."""

from sparsepeft.methods.models import extend, load_backbone

__all__ = ["extend", "load_backbone"]
