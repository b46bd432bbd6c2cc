"""How far a plan for a budget keeps its promise: perplexity on text that no choice has seen, and time of a step.

Plans are made on WikiText-2's validation part, by ``sparsepeft sparsify --budget``, and scored on its test part. A
masked language model without a head (MiniLM) has one fitted first, on WikiText-2's training part: its layers stay as
they are.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, get_linear_schedule_with_warmup

from sparsepeft.backbones import resolve_model
from sparsepeft.inference.encoding import num_positions
from sparsepeft.methods.language_models import load_language_model
from sparsepeft.methods.models import load_model_config, load_tokenizer
from sparsepeft.methods.sparse import with_masks
from sparsepeft.planning import LossMeter, read_text
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import read_documents
from sparsepeft.spt import load_sparse
from sparsepeft.training import sparsify_language_model
from sparsepeft_research.experiments.spt_quality import Run
from sparsepeft_research.experiments.spt_quality.texts import WIKITEXT, blocks, documents

BUDGET = 0.02
SEED = 0
HEAD_STEPS, HEAD_LENGTH, HEAD_BATCH, HEAD_LEARNING_RATE = 400, 128, 8, 1e-3
MINILM = "minilm"  # as --model: the bundled one


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """One for each length that the model takes."""
    name = Path(options.model).name
    for length in options.lengths:
        about = {"kind": "budget", "setting": f"{BUDGET:g}"}
        yield Run(f"{name}/budget-{length}", about, partial(_measure, options, length))


def _measure(options: argparse.Namespace, length: int, work: Path) -> dict[str, Any]:
    model, head_steps = resolve_model(None if options.model == MINILM else options.model), 0
    limit = num_positions(load_model_config(model))
    length = length if limit is None else min(length, limit)
    is_causal = load_language_model(model, masked=True)[1]
    if not is_causal:
        head_steps = options.steps or HEAD_STEPS
        model = str(_with_head(model, options.data_dir, head_steps, work / "with_head"))
    text, sparse = options.data_dir / WIKITEXT / "valid.txt", work / "sparse"
    settings = {"budget": BUDGET, "seed": SEED}
    made = sparsify_language_model(model, sparse, (str(text),), settings=settings, block_length=length)

    tokenizer = load_tokenizer(model)
    scored: Any = blocks(documents(options.data_dir, WIKITEXT)[1], tokenizer, length, options.scored_tokens // length)
    scored = scored if is_causal else with_masks(tokenizer, scored, SEED)
    loaded, _ = load_language_model(model, masked=True)
    losses = [_loss(loaded, scored), _loss(load_sparse(loaded, sparse), scored)]
    shutil.rmtree(sparse)
    plan = made.pop("plan")
    return {
        "model": Path(options.model).name,
        "seed": SEED,
        "score": math.exp(losses[1]),
        "main_metric": "perplexity",
        "block_length": length,
        "plan": plan,
        "held_out": {
            "dense": math.exp(losses[0]),
            "sparse": math.exp(losses[1]),
            "change": math.expm1(losses[1] - losses[0]),
        },
        "spt": {name: made[name] for name in ("config", "report")},
        "head_steps": head_steps,
        "environment": environment(),
    }


def _loss(model: Any, data: Any) -> float:
    return LossMeter(model, read_text(model, data), resumable=False).initial


def _with_head(model: str, data_dir: Path, num_steps: int, folder: Path) -> Path:
    """Fit what a masked language model's files lack, its head, and nothing else."""
    torch.manual_seed(SEED)
    loaded, loading = AutoModelForMaskedLM.from_pretrained(model, output_loading_info=True)
    tokenizer = load_tokenizer(model)
    if loading["missing_keys"]:
        fresh = [p for n, p in loaded.requires_grad_(False).named_parameters() if n in loading["missing_keys"]]
        optimizer = torch.optim.AdamW([p.requires_grad_() for p in fresh], lr=HEAD_LEARNING_RATE)
        schedule = get_linear_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
        text = read_documents([str(data_dir / WIKITEXT / "train.txt.gz")])[0][: 1 << 21]
        rows = blocks([text], tokenizer, HEAD_LENGTH, num_steps * HEAD_BATCH)
        for step, batch in enumerate(_batches(rows, num_steps)):
            loaded(**with_masks(tokenizer, batch, step)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    loaded.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _batches(rows: Tensor, count: int) -> Iterator[Tensor]:
    """So many batches, from the beginning again when the rows are used up."""
    for step in range(count):
        yield rows[[(step * HEAD_BATCH + i) % len(rows) for i in range(HEAD_BATCH)]]
