"""Fine-tuning methods by name: their hyperparameters, building their models, and reading these back."""
