"""What a device has to store for many tasks on one backbone, method by method.

Models are built on the meta device: parameters are counted, none is allocated and no weights are read.
"""

from sparsepeft.storage.counting import METHODS
from sparsepeft.storage.report import MethodStorage, StorageReport, storage_report

__all__ = ["METHODS", "MethodStorage", "StorageReport", "storage_report"]
