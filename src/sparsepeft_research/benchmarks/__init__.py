"""Benchmarks: what each measures is in :mod:`sparsepeft_research.benchmarks.registry`."""
