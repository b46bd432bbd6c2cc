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
    from sparsepeft_cli.terminal.console import err, out

    with err.status("loading"):
        from sparsepeft.runs.pushing import push_to_hub
    with err.status(f"uploading to {repo_id}"):
        url = push_to_hub(folder, repo_id, private)
    out.print(url, highlight=False, soft_wrap=True)
