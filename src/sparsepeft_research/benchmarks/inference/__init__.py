"""What inference costs: each method and its peers, as processes that take turns."""

from sparsepeft_research.benchmarks.inference.report import device_throughput, factors
from sparsepeft_research.benchmarks.inference.session import run
from sparsepeft_research.benchmarks.inference.workloads import architecture
from sparsepeft_research.benchmarks.settings import PRECISIONS, SYSTEMS, WORKLOADS, InferenceBenchmark

__all__ = [
    "PRECISIONS",
    "SYSTEMS",
    "WORKLOADS",
    "InferenceBenchmark",
    "architecture",
    "device_throughput",
    "factors",
    "run",
]
