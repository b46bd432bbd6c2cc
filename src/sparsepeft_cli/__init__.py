"""The command line, ``sparsepeft``."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs; exit codes are those of :func:`sparsepeft_cli.app.run`."""
    try:
        from sparsepeft_cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        hint = f'The command line needs {error.name}, which is not installed; run pip install "sparsepeft[cli]".'
        print(f"Error: {hint}", file=sys.stderr)
        sys.exit(2)
    run()
