"""A Flower app whose clients fine-tune memories: docs/federated.md."""
