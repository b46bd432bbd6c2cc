"""Measuring: alternating timing, counted memory, and what SPT saves of a fine-tuning step."""

from sparsepeft_research.benchmarks.memory import peak_bytes
from sparsepeft_research.benchmarks.timing import Timing, time_alternating, wait_until_idle

__all__ = ["Timing", "peak_bytes", "time_alternating", "wait_until_idle"]
