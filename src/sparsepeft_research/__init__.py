"""The papers' tables, benchmarks and experiments. Nothing of :mod:`sparsepeft` needs it."""
