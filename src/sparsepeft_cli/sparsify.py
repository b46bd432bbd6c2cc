"""``sparsepeft sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or local folder of a causal or masked language model.")
    ],
    output_dir: Annotated[Path, options.output_dir("Folder for what the conversion adds, and the report.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Typical text for calibration: .txt, .jsonl, .csv or .tsv; may be repeated."),
    ] = None,
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the text, in files with rows.")] = "text",
    block_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Tokens of a calibration sequence. [default: the model's, at most 512]"),
    ] = None,
    bos_token: Annotated[
        bool | None,
        typer.Option(
            "--bos-token/--no-bos-token",
            help="Begin each with the begin-of-text token. [default: if the tokenizer does so by itself]",
        ),
    ] = None,
    set_: Annotated[list[str] | None, options.settings("A setting of SptConfig")] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Make a language model's attention and FFNs sparse; report what that changes before any fine-tuning.

    Saves routers, codebooks and settings, not the model's weights; `sparsepeft.spt.load_sparse` puts them together.

    Example: `sparsepeft sparsify MODEL --output-dir out/sparse --text typical.txt --set num_active_blocks=6`
    """
    from sparsepeft.training import parse_settings, sparsify_language_model
    from sparsepeft_cli.terminal.console import err, out, print_json

    settings = parse_settings(set_ or [], example="num_active_blocks=6")
    with err.status("converting"):
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
    for part in report_parts(results["config"], results["report"], results["model"]):
        out.print(part, highlight=False)
    perplexity = results["perplexity"]
    if perplexity["dense"] is not None:
        out.print(
            f"perplexity {perplexity['dense']:.2f} dense, {perplexity['sparse']:.2f} sparse, "
            f"on {results['num_scored_tokens']:,} other tokens of the text",
            highlight=False,
        )
    out.print(f"next: load_sparse(model, '{output_dir}') in Python", highlight=False, soft_wrap=True)


def report_parts(config: dict[str, Any], report: dict[str, Any], title: str) -> list[Any]:
    """What a conversion changed, for the screen: a table of the layers and a line on the FFNs' cost."""
    from sparsepeft_cli.terminal.console import table

    columns = {
        "recall": report["recall"],
        "attention error": report["attention_error"],
        "FFN error": report["feed_forward_error"],
    }
    shown = {name: values for name, values in columns.items() if values}
    layers: dict[str, dict[str, float]] = {}
    for column, values in shown.items():
        for name, value in values.items():
            layers.setdefault(_layer(name), {})[column] = value
    rows = [
        [layer, *(f"{values[column]:.3f}" if column in values else "" for column in shown)]
        for layer, values in layers.items()
    ]
    return [*([table(title, ["layer", *shown], rows)] if rows else []), sparse_line(config, report)]


def sparse_line(config: dict[str, Any], report: dict[str, Any]) -> str:
    """What became sparse, and how far."""
    parts = []
    if config["attention"]:
        parts.append(f"attention: {config['top_l']} keys for each query, by {config['granularity']}")
    if config["ffn"]:
        parts.append(f"FFN: {config['num_active_blocks']} of {config['num_blocks']} blocks for each token")
        if report["feed_forward_operations"] is not None:
            parts[-1] += f", {report['feed_forward_operations']:.1%} of the multiply-adds"
    return "\n".join(parts)


def _layer(name: str) -> str:
    """A layer's name from that of a part of it: up to its number."""
    words = name.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[-1] + 1]) if numbers else name
