"""``sparsepeft push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train`.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face hub, or name for your own.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a finished run to the Hugging Face hub: weights, model card, results and settings.

    Paths of this machine become names in what is uploaded. When the upload breaks off, the same command repeats it.

    Example: `sparsepeft push out/topics me/topics --private`
    """
    from sparsepeft_cli.terminal.console import out

    out.print(upload(folder, repo_id, private), highlight=False, soft_wrap=True)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a finished run, see :func:`sparsepeft.runs.pushing.push_to_hub`, and say so; its address."""
    from sparsepeft_cli.terminal.console import err

    with err.status("loading"):
        from sparsepeft.runs.pushing import push_to_hub
    with err.status(f"uploading to {repo_id}"):
        return push_to_hub(folder, repo_id, private)
