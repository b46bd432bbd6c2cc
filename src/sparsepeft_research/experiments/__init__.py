"""Experiments behind the documentation: ``python -m sparsepeft_research.experiments.NAME --help``."""
