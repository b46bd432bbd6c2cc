"""Trained tasks for devices without PyTorch: the backbone once, and a small file for each task."""

from sparsepeft.export.exporting import FORMATS, export_tasks

__all__ = ["FORMATS", "export_tasks"]
