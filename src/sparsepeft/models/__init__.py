"""What is known of transformers' models: their layers, FFNs and heads, and what happens during a forward pass."""
