"""``sparsepeft sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsepeft_cli.terminal import options


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or local folder of a causal or masked language model.")
    ],
    output_dir: Annotated[Path, options.output_dir("Folder for what the conversion adds, and the report.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Typical text for calibration: .txt, .jsonl, .csv or .tsv; may be repeated."),
    ] = None,
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the text, in files with rows.")] = "text",
    block_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a calibration sequence. [default: the model's, at most 512]")
    ] = None,
    bos_token: Annotated[
        bool | None,
        typer.Option(
            "--bos-token/--no-bos-token",
            help="Begin each with the begin-of-text token. [default: if the tokenizer does so by itself]",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="How much higher the perplexity may become, such as 2% or 0.02: settings of each module are chosen by "
            "measurement.",
        ),
    ] = None,
    set_: Annotated[list[str] | None, options.settings("A setting of SptConfig")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Make a language model's attention and FFNs sparse; report what that changes before any fine-tuning.

    Saves what is added (settings, codebooks, routers), not the model's weights, for `sparsepeft.spt.load_sparse`.

    Example: `sparsepeft sparsify MODEL --output-dir out/sparse --text typical.txt --set num_active_blocks=0.25`

    Example: `sparsepeft sparsify MODEL --output-dir out/sparse --text typical.txt --budget 2%`
    """
    from sparsepeft.training import parse_settings, sparsify_language_model
    from sparsepeft_cli.terminal.console import err, out, print_json
    from sparsepeft_cli.terminal.summary import report_parts

    settings = parse_settings(set_ or [], example="num_active_blocks=0.25")
    if budget is not None:
        settings["budget"] = budget
    with err.status("converting" if budget is None else "measuring what each module may become"):
        results = sparsify_language_model(
            model,
            output_dir,
            [str(path) for path in text or ()],
            text_column=text_column,
            settings=settings,
            block_length=block_length,
            bos_token=bos_token,
            overwrite=overwrite,
        )
    if json:
        print_json(results)
        return
    for part in report_parts(results, results["model"]):
        out.print(part, highlight=False, soft_wrap=True)
    perplexity = results["perplexity"]
    if perplexity["dense"] is not None:
        out.print(
            f"perplexity {perplexity['dense']:.2f} dense, {perplexity['sparse']:.2f} sparse, "
            f"on {results['num_scored_tokens']:,} other tokens of the text",
            highlight=False,
        )
    out.print(f"next: load_sparse(model, '{output_dir}') in Python", highlight=False, soft_wrap=True)
