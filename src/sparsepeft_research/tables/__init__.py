"""The generated parts of the documentation: ``python -m sparsepeft_research.tables`` writes them from result files."""
