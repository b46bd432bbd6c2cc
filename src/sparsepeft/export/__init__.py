"""Trained tasks for devices without PyTorch: the backbone once, and a small file for each task."""

from sparsepeft.export.exporting import export_tasks
from sparsepeft.export.formats import FORMATS

__all__ = ["FORMATS", "export_tasks"]
