"""Making a language model sparse and saving what that adds, with a report of what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.folders import check_output, replacing, write_json
from sparsepeft.inference.encoding import longest_input
from sparsepeft.methods.language_models import (
    CALIBRATION_BLOCKS,
    HELD_OUT_TOKENS,
    load_language_model,
    perplexity,
)
from sparsepeft.methods.models import load_model_config, load_tokenizer, to_accelerator
from sparsepeft.methods.sparse import describe, make_sparse, read_spt_settings, with_masks
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import (
    begin_token,
    count_for,
    cut,
    evenly_spaced,
    fingerprints,
    join,
    num_predicted,
    read_documents,
    without,
)
from sparsepeft.spt import answering, save_sparse
from sparsepeft.spt.loading import SPARSE_WEIGHTS

REPORT = "spt.json"
WRITTEN = (REPORT, SPARSE_WEIGHTS)
_FORMAT_VERSION = 1
_SCORED_TOKENS = 1 << 15
_BATCH = 4


def sparsify_language_model(
    model: str,
    output_dir: str | Path,
    text: Sequence[str] = (),
    *,
    text_column: str = "text",
    settings: dict[str, Any] | None = None,
    block_length: int | None = None,
    bos_token: bool | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a causal or masked language model, calibrated on a few blocks of a text.

    The output folder then holds what the conversion adds (``spt.safetensors``, for
    :func:`sparsepeft.spt.load_sparse`) and ``spt.json``, which come there together.

    Args:
        model: hub id or local folder.
        output_dir: folder for the two files.
        text: files for calibration, as for fine-tuning; not needed where attention stays dense.
        text_column: of the files with rows.
        settings: keys of :class:`sparsepeft.spt.SptConfig`.
        block_length: tokens of a calibration sequence; None is what the model takes, at most 512.
        bos_token: begin each with the begin-of-text token; None does if the tokenizer puts it before every text.
        overwrite: replace a conversion that is already in the folder.

    Returns:
        The content of ``spt.json``. Perplexity, dense and sparse, is that of a causal model on up to 32,768 tokens of
        text that nothing was chosen by; None where there is no such text. A plan that keeps to a budget was made on
        the calibration blocks, and kept to it on up to 8,192 other tokens as well; of a masked language model 15 % of
        the tokens are masked there.

    Raises:
        UserError: model, text or settings cannot be used.
    """
    config, folder = read_spt_settings(settings or {}), Path(output_dir)
    check_output(folder, (REPORT,), "a sparse model", overwrite)
    if config.budget is not None and not text:
        raise UserError(
            f"budget={config.budget} was given, but no text to keep to it on; pass `text`, files of typical text."
        )
    if config.attention and not text:
        raise UserError(
            "Sparse attention is calibrated on text, and none was given; pass `text`, files of typical text, or leave "
            "attention dense by the setting attention=false."
        )
    with replacing(folder, WRITTEN) as staged:
        model_id = resolve_model(model)
        calibration = held_out = rest = begin = None
        if text:
            tokenizer = load_tokenizer(model_id)
            length = longest_input(tokenizer, load_model_config(model_id), block_length, "block_length")
            begin = begin_token(tokenizer, bos_token)
            blocks = cut(join(read_documents(text, text_column), tokenizer), length, "text", begin)
            calibration, rest = evenly_spaced(blocks, CALIBRATION_BLOCKS), without(blocks, CALIBRATION_BLOCKS)
            if config.budget is not None and len(rest):
                count = min(count_for(HELD_OUT_TOKENS, rest), -(-len(rest) // 2))  # the others are scored
                held_out, rest = evenly_spaced(rest, count), without(rest, count)
        loaded, is_causal = load_language_model(model_id, masked=True)
        to_accelerator(loaded)
        scored = None
        if is_causal and rest is not None and len(rest):
            scored = evenly_spaced(rest, count_for(_SCORED_TOKENS, rest))
        dense = _perplexity(loaded, scored)
        batches: list[Any] = [calibration, held_out]
        if config.budget is not None and not is_causal:
            batches = [None if each is None else with_masks(tokenizer, each, config.seed) for each in batches]
        sparsification = make_sparse(loaded, config, *batches)
        with answering(loaded, "sparse"):  # whatever the settings say, which are for later
            sparse = _perplexity(loaded, scored)
        results = {
            "format_version": _FORMAT_VERSION,
            "model": describe_backbone(model_id),
            **describe(sparsification),
            "perplexity": {"dense": dense, "sparse": sparse},
            "num_scored_tokens": 0 if scored is None else num_predicted(scored),
            "bos_token": None if begin is None else tokenizer.convert_ids_to_tokens(begin),
            "calibration": None if calibration is None else list(calibration.shape),
            "data_fingerprints": fingerprints(text),
            "environment": environment(),
        }
        save_sparse(loaded, staged)
        write_json(staged / REPORT, results)
    return results


def _perplexity(model: Any, blocks: Tensor | None) -> float | None:
    return None if blocks is None else perplexity(model, blocks, _BATCH)["perplexity"]
