"""AdapterHub's library beside ours: an environment of its own, and the programs that run in it."""
