"""The perplexity of a fine-tuned language model, on its validation text or on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepeft.backbones import backbone_of_run
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import longest_input
from sparsepeft.methods.language_models import load_trained_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer, to_accelerator
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.corpus import cut, fingerprints, join, load_corpus, read_documents
from sparsepeft.runs.held_out import not_held_out_any_more, read_held_out


def evaluate_language_model(
    folder: Path,
    run: dict[str, Any],
    model: str | None = None,
    *,
    test_file: str | None = None,
    device: str | None = None,
    text_column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> tuple[dict[str, dict[str, float]], tuple[str, ...], dict[str, str]]:
    """Perplexity of a run's model on its validation text, or on a file.

    Args:
        folder: the output folder of ``sparsepeft train --task lm``.
        run: the content of its ``run.json``.
        model: the backbone, if it has moved since.
        test_file: measure on this text instead.
        device: where to compute; None is the accelerator, if there is one.
        text_column, delimiter, encoding: of ``test_file``; by default the training text's column and encoding.

    Returns:
        The metrics by name of the part, notes on the text, and SHA-256 of its files by name.

    Raises:
        UserError: files are damaged or missing, the backbone is another, or it cannot be told any more which text was
            trained on.
    """
    config = RunConfig(**run["config"])
    held_out: list[str] | None = None
    notes: tuple[str, ...] = ()
    documents: list[str] = []
    if test_file is None:
        held_out, notes = _held_out_text(folder, config, run)
    else:
        documents = read_documents(
            [test_file], text_column or config.text_column or "text", delimiter, encoding or config.encoding
        )
    home = str(folder) if config.method == "full" else backbone_of_run(folder, model, config.model)
    trained = load_trained_language_model(
        folder,
        config.method,
        home,
        is_sparse=config.spt is not None,
        backbone_fingerprint=run.get("backbone_fingerprint"),
    )
    to_accelerator(trained, device)
    tokenizer = load_tokenizer(home)
    block_length = longest_input(tokenizer, trained.config, config.block_length, "block_length")
    begin = run.get("bos_token_id")
    if test_file is None:
        corpus = load_corpus(config, tokenizer, block_length, begin, held_out=held_out)
        part, blocks, notes = "validation", corpus.validation, (*corpus.notes, *notes)
        digests = fingerprints([*config.text, *config.validation_text])
    else:
        part, blocks = "test", cut(join(documents, tokenizer), block_length, "text of `test_file`", begin)
        digests = fingerprints([test_file])
        trained_on = list((run.get("data_fingerprints") or {}).values())[: len(config.text)]  # before validation text's
        if set(digests.values()) & set(trained_on):
            notes = (f"{Path(test_file).name} was trained on: its perplexity says nothing about new text",)
    measured = perplexity(trained, blocks, config.recipe_values().batch_size, config.precision)
    return {part: measured}, notes, digests


def _held_out_text(folder: Path, config: RunConfig, run: dict[str, Any]) -> tuple[list[str] | None, tuple[str, ...]]:
    """Digests of held-out documents where they must be looked for, and notes."""
    files = [*config.text, *config.validation_text]
    for file in files:
        if not Path(file).exists():
            raise UserError(
                f"The run in {folder} was trained with the file {file}, which is not there any more; put it back, or "
                "measure on other text by `test_file`."
            )
    before = run.get("data_fingerprints") or {}
    changed = [name for name, digest in fingerprints(files).items() if before and digest not in before.values()]
    if not changed:
        return None, ()
    names = ", ".join(changed)
    if config.validation_text:
        return None, (f"{names} {'has' if len(changed) == 1 else 'have'} changed since training",)
    held_out = read_held_out(folder).get("validation")
    if not held_out:
        raise not_held_out_any_more(folder, names, is_known=False)
    return held_out, ()
