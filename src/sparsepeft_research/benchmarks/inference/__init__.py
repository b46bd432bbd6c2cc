"""What inference costs: each method and its peers, as processes that take turns."""
