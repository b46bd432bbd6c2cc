"""``sparsepeft --version``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

_SHOWN = ("torch", "transformers", "peft")


def show_version(asked: bool) -> None:
    """Print this package's version and those of what it stands on, without loading any of it, and end."""
    if not asked:
        return
    others = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
    typer.echo(f"sparsepeft {_version('sparsepeft')} ({others}, Python {platform.python_version()})")
    raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
