"""``sparsepeft serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsepeft_cli.terminal import options


def command(
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A task and its folder; may be repeated. [default: the demo's task]"),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Serve every task in this folder, and those that come and go there.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The backbone: hub id or folder. [default: that of the tasks]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; others than this machine's own need --token-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any that is free.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the tokens that callers may show, one in each line.")
    ] = None,
    admin_token_file: Annotated[
        Path | None, typer.Option(help="The same for those who may load and remove tasks.")
    ] = None,
    default_task: Annotated[
        str | None, typer.Option(help="For requests that name no task. [default: the only one]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the backbone: fp32, bf16 or fp16.")] = "fp32",
    device: options.Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: PyTorch's]")] = None,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens of a batch, padding included.")] = 4096,
    longest_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a text waits for others to be batched with.")
    ] = 1.0,
    queue_size: Annotated[int, typer.Option(min=1, help="Texts that may wait; past it requests get 429.")] = 2048,
    max_client_batch_size: Annotated[int, typer.Option(min=1, help="Texts of a request.")] = 512,
    payload_limit: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 2_000_000,
) -> None:
    """Answer tasks over HTTP: one backbone, many tasks, in the shapes that clients speak.

    Clients of text-embeddings-inference (/predict), huggingface_hub's InferenceClient (/), and vLLM (/classify) are
    answered, for one task by /tasks/NAME in front or by `model`; /v1/predict_all answers every task at once. In a
    browser the address shows a page.

    Example: `sparsepeft serve`

    Example: `sparsepeft serve --task mood=out/mood --task topic=out/topic --port 8000`
    """
    from sparsepeft.extras import require

    for library in ("fastapi", "uvicorn", "prometheus_client"):
        require(library, "serve", "`sparsepeft serve`")
    from sparsepeft_serve.run import read_tasks, serve
    from sparsepeft_serve.settings import ServeSettings, check_host, read_tokens

    tokens, admin_tokens = (() if file is None else read_tokens(file) for file in (token_file, admin_token_file))
    check_host(host, tokens)
    settings = ServeSettings(
        longest_wait_ms=longest_wait,
        queue_size=queue_size,
        max_client_batch_size=max_client_batch_size,
        payload_limit=payload_limit,
        tokens=tokens,
        admin_tokens=admin_tokens,
        tasks_dir=tasks_dir,
        default_task=default_task,
    )
    serve(
        read_tasks(task or [], tasks_dir),
        model,
        settings,
        host=host,
        port=port,
        dtype=dtype,
        token_budget=token_budget,
        threads=threads,
        device=device,
    )
