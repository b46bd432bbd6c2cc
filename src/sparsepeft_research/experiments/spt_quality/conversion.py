"""What sparse attention costs before any training: perplexity by the way in which keys are chosen.

All layers attend to n/8 keys, FFNs stay dense. Codebooks are made from the text's training part, losses are those of
blocks of its test part, so that two settings can be compared block by block.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsepeft.methods.language_models import CALIBRATION_BLOCKS, load_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.sparse import describe, make_sparse, read_spt_settings
from sparsepeft.provenance import environment
from sparsepeft_research.experiments.spt_quality import Run
from sparsepeft_research.experiments.spt_quality.texts import TEXTS, blocks, documents

# Of SptConfig; None is the dense model.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "inner_product-token": {},
    "inner_product-block": {"granularity": "block"},
    "matches-token": {"similarity": "matches"},
    "matches-block": {"similarity": "matches", "granularity": "block"},
}


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Length by length, text by text."""
    model = Path(options.model).name
    for length in options.lengths:
        for text in TEXTS:
            for setting, spt in SETTINGS.items():
                about = {"kind": "conversion", "setting": setting, "text": text, "length": length}
                settings = None if spt is None else {"ffn": False, "top_l": 1 / 8} | spt
                name = f"{model}/conversion-{text}-{length}-{setting}"
                yield Run(name, about, partial(_measure, options, text, length, settings))


def _measure(
    options: argparse.Namespace, text: str, length: int, spt: dict[str, Any] | None, work: Path
) -> dict[str, Any]:
    tokenizer = load_tokenizer(options.model)
    to_learn_from, held_out = documents(options.data_dir, text)
    scored = blocks(held_out, tokenizer, length, options.scored_tokens // length)
    model, _ = load_language_model(options.model)
    described = None
    if spt is not None:
        calibration = blocks(to_learn_from, tokenizer, length, CALIBRATION_BLOCKS)
        described = describe(make_sparse(model, read_spt_settings(spt), calibration))
    losses = [perplexity(model, block[None], 1)["loss"] for block in scored]
    return {
        "task": "lm",
        "model": Path(options.model).name,
        "seed": 0,
        "score": math.exp(statistics.mean(losses)),
        "main_metric": "perplexity",
        "losses": losses,
        "num_scored_tokens": scored.numel() - len(scored),
        "spt": described,
        "environment": environment(),
    }
