"""``python -m sparsepeft_cli``."""

from sparsepeft_cli import main

main()
