"""What sparsity costs after fine-tuning: LoRA on the sparse model against LoRA on the dense one, on BBC News.

The model's vocabulary is cut to the tokens that occur, see :mod:`.vocabulary`. All settings see the same blocks in the
same order, once. Perplexity is measured on articles of the test part, on which nothing is chosen but the learning rate,
for the dense model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsepeft.methods.models import load_tokenizer
from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments.spt_quality import Run
from sparsepeft_research.experiments.spt_quality.texts import BBC, documents, leading
from sparsepeft_research.experiments.spt_quality.vocabulary import cut_vocabulary

BLOCK_LENGTH, BATCH_SIZE, STEPS = 512, 2, 150
LEARNING_RATE = 3e-4  # of 3e-4 and 1e-3 the better one for the dense model, after 40 steps
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_ATTENTION: dict[str, Any] = {"top_l": 1 / 8}
_ONLY_FFN = {"attention": False}
_HALF, _QUARTER = {"num_active_blocks": 1 / 2}, {"num_active_blocks": 1 / 4}
_DENSE_FFNS = {f"model.layers.{layer}.mlp": {"dense": True} for layer in range(12, 18)}
# Of SptConfig; None is the dense model.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "attention": _ATTENTION | {"ffn": False},
    "exact-half": _ONLY_FFN | _HALF,
    "attention-exact-half": _ATTENTION | _HALF,
    "exact-quarter": _ONLY_FFN | _QUARTER,
    "attention-exact-quarter": _ATTENTION | _QUARTER,
    "attention-block": _ATTENTION | {"ffn": False, "granularity": "block"},
    "routed-half": _ONLY_FFN | _HALF | {"values": "routed"},
    # What brings the gradient closer to the dense one: finer blocks, the upper third of FFNs dense, or the first steps.
    "exact-half-64": _ONLY_FFN | _HALF | {"num_blocks": 64},
    "exact-half-upper-dense": _ONLY_FFN | _HALF | {"overrides": _DENSE_FFNS},
    "exact-half-dense-start": _ONLY_FFN | _HALF | {"dense_steps": STEPS // 10},
    "exact-quarter-upper-dense": _ONLY_FFN | _QUARTER | {"overrides": _DENSE_FFNS},
    "exact-quarter-dense-start": _ONLY_FFN | _QUARTER | {"dense_steps": STEPS // 10},
}


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, the dense model first."""
    model = Path(options.model).name
    for seed in options.seeds:
        for setting, spt in SETTINGS.items():
            about = {"kind": "finetuning", "setting": setting}
            yield Run(f"{model}/finetuning-{setting}-{seed}", about, partial(_measure, options, seed, spt))


def _measure(options: argparse.Namespace, seed: int, spt: dict[str, Any] | None, work: Path) -> dict[str, Any]:
    folder, run = work / "cut", work / "run"
    about = folder / "about.json"
    steps = options.steps or STEPS
    if not about.exists():
        num_tokens = (steps * BATCH_SIZE + 1) * BLOCK_LENGTH
        about.write_text(json.dumps(_prepare(options, num_tokens, folder)), encoding="utf-8")
    config = RunConfig(
        task="lm",
        text=(str(folder / "train.jsonl"),),
        validation_text=(str(folder / "held_out.jsonl"),),
        output_dir=str(run),
        model=str(folder),
        block_length=BLOCK_LENGTH,
        batch_size=BATCH_SIZE,
        max_steps=steps,
        learning_rate=options.learning_rate,
        precision="bf16",
        seed=seed,
        settings=LORA,
        spt=spt,
    )
    results = train(config)
    shutil.rmtree(run)
    return {**results, **json.loads(about.read_text(encoding="utf-8"))}


def _prepare(options: argparse.Namespace, num_tokens: int, folder: Path) -> dict[str, Any]:
    """Write model and texts, and say what they are."""
    tokenizer = load_tokenizer(options.model)
    to_learn_from, held_out = documents(options.data_dir, BBC)
    texts = {
        "train": leading(to_learn_from, tokenizer, num_tokens),
        "held_out": leading(held_out, tokenizer, options.scored_tokens),
    }
    vocabulary = cut_vocabulary(options.model, texts, folder)
    return {"model": Path(options.model).name, "vocabulary": vocabulary}
