"""What inference costs: each method and its peers, as processes that take turns."""

from sparsepeft.benchmarking.inference.report import device_throughput, factors
from sparsepeft.benchmarking.inference.run import run_inference_benchmark
from sparsepeft.benchmarking.inference.settings import WORKLOADS, InferenceBenchmark
from sparsepeft.benchmarking.inference.systems import PRECISIONS, SYSTEMS
from sparsepeft.benchmarking.inference.workloads import architecture

__all__ = [
    "PRECISIONS",
    "SYSTEMS",
    "WORKLOADS",
    "InferenceBenchmark",
    "architecture",
    "device_throughput",
    "factors",
    "run_inference_benchmark",
]
