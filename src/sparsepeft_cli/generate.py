"""``sparsepeft generate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsepeft_cli.terminal import options


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Output folder of `sparsepeft train --task lm`.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; without it, prompts are read from --file or stdin."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help='A prompt a line: plain text, or JSON with "prompt".')] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Add at most so many tokens. [default: 100, or what fits]")
    ] = None,
    stop_strings: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the model's chat template around a prompt.")] = False,
    model: options.TrainedModel = None,
    device: options.Device = None,
    infer: options.Infer = None,
    dtype: Annotated[str, options.dtype("--dtype", "Of the weights: fp32, bf16 or fp16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help='A JSON line for each continuation: "prompt", "generated_text".')
    ] = False,
    **drawing: Any,
) -> None:
    """Continue texts with a fine-tuned language model.

    Prints each prompt with what follows it; with --chat the answers, and with --json what follows alone.

    Example: `sparsepeft generate out/mine "Once upon a time"`

    Example: `sparsepeft generate out/mine --file prompts.txt --do-sample --temperature 0.7 --json`
    """
    prompts = _prompts(prompt, file)
    from sparsepeft.devices import keep_freed_memory
    from sparsepeft.training import GenerationSettings, Generator

    drawing = {name: value for name, value in drawing.items() if value is not None}
    settings = GenerationSettings(max_new_tokens=max_new_tokens, stop_strings=tuple(stop_strings or ()), **drawing)
    keep_freed_memory()
    generator = Generator(folder, model, device=device, dtype=dtype, batch_size=batch_size, infer=infer)
    if len(prompts) == 1 and settings.num_return_sequences == 1 and not stop_strings and not as_json:
        continuations = generator.generate(prompts, settings, chat=chat, on_text=_show)
        _show("" if chat else prompts[0])
        next(continuations)
        print()
        return
    for start, texts in zip(prompts, generator.generate(prompts, settings, chat=chat), strict=True):
        for text in texts:
            if as_json:
                print(json.dumps({"prompt": start, "generated_text": text}, ensure_ascii=False), flush=True)
            else:
                print(text if chat else start + text, end="\n\n", flush=True)


_DRAWING: dict[str, tuple[Any, ...]] = {
    "do_sample": (bool, "Draw tokens. [default: the most likely]"),
    "temperature": (float, "[default: the model's]"),
    "top_p": (float, "Of the most likely with this probability. [default: the model's]"),
    "top_k": (int, "Of so many; 0 is all. [default: the model's, or 50]"),
    "num_return_sequences": (int, "Continuations of each prompt. [default: 1]"),
    "seed": (int, "What is drawn. [default: 42]"),
}
options.declare(command, options.section("Drawing (--do-sample)", _DRAWING))


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    from sparsepeft.errors import UserError

    if prompt is not None and file is not None:
        raise UserError("A prompt and --file were both given; pass one of them.")
    if prompt is not None:
        return [prompt]
    from sparsepeft.generation.prompts import parse_prompts, read_prompts

    return list(parse_prompts(sys.stdin.read(), "standard input")) if file is None else read_prompts(file)
