"""Measuring: alternating timing, counted memory, and what SPT saves of a fine-tuning step."""

from sparsepeft.benchmarking.memory import peak_bytes
from sparsepeft.benchmarking.timing import Timing, time_alternating, wait_until_idle

__all__ = ["Timing", "peak_bytes", "time_alternating", "wait_until_idle"]
