"""Throughput of fine-tuning: whole runs, and bare training steps of equal batches."""
