"""What inference costs: each method and its peers, as processes that take turns."""

from sparsepeft_research.benchmarks.inference.report import device_throughput, factors
from sparsepeft_research.benchmarks.inference.session import run
from sparsepeft_research.benchmarks.inference.settings import WORKLOADS, InferenceBenchmark
from sparsepeft_research.benchmarks.inference.systems import PRECISIONS, SYSTEMS
from sparsepeft_research.benchmarks.inference.workloads import architecture

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
