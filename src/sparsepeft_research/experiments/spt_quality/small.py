"""What SPT costs in the paper's form, keys by matching codes and FFNs routed in all, on small models, all with LoRA.

- ``lm``: a small Llama is fine-tuned on BBC News as a language model. What is in ``LM`` differs from the base setting
  (attention and FFN sparse, L = n/8 by token, half of 8 clustered blocks) in one thing each, has one mechanism alone,
  or is mild in all. Perplexity on held-out articles: dense, right after conversion, after fine-tuning.
- ``starts``: no training. One mechanism alone, and where the FFNs' blocks and routers start from: the weights
  (clusters of like rows, centres) or a calibration batch (clusters of what fires together, regression), also with a
  linear map in the place of the blocks that are not used (``compensated``). Perplexity on WikiText-2, from which the
  Llama was made: calibrated on the validation part, measured on the test part. Its blocks begin with no begin-of-text
  token, as in its training; ``begin_token.py`` is about models that want one.
- ``encoder``: MiniLM on GLUE tasks, 200 examples. Texts are short, so L is a fraction of the calibration batch's
  length.

The held-out articles are the task's test part; nothing is chosen on it. Seed by seed, what matters most first.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsepeft.methods.language_models import CALIBRATION_BLOCKS, load_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.sparse import describe, make_sparse, read_spt_settings
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import cut, evenly_spaced, fingerprints, join, read_documents
from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments.spt_quality import Run
from sparsepeft_research.experiments.spt_quality.texts import BBC, WIKITEXT, documents, write_documents

BLOCK_LENGTH, BATCH_SIZE, LM_STEPS, ENCODER_STEPS = 512, 8, 100, 1000
SCORED_ARTICLES, SCORED_BLOCKS = 60, 64  # of lm, of starts
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PAPER = {"similarity": "matches", "values": "routed"}
# Of SptConfig, beside PAPER; None is the dense model. A block of 64 keys would be all of L = n/8 here.
LM: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "both": {},
    "ffn": {"attention": False},
    "attention": {"ffn": False},
    "both-contiguous": {"block_assignment": "contiguous"},
    "both-quarter-active": {"num_active_blocks": 2},
    "both-three-quarters-active": {"num_active_blocks": 6},
    "both-quarter-keys": {"top_l": 0.25},
    "both-block-attention": {"granularity": "block", "block_size": 16},
    "both-compensated": {"compensation_rank": 32},
    "both-quarter-active-compensated": {"num_active_blocks": 2, "compensation_rank": 32},
    "both-mild": {"num_active_blocks": 6, "top_l": 0.25, "compensation_rank": 32},
}
ENCODER: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "both": {"top_l": 0.25},
    "ffn": {"attention": False},
    "attention": {"ffn": False, "top_l": 0.25},
}
ENCODER_TASKS = ("sst2", "mrpc")
ACTIVE = (2, 4, 6)
# Whether a calibration batch is used, and what differs of SptConfig.
STARTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "activity": (True, {}),
    "weights": (False, {}),
    "contiguous-activity": (True, {"block_assignment": "contiguous"}),
    "contiguous-weights": (False, {"block_assignment": "contiguous"}),
    "compensated": (True, {"compensation_rank": 32}),
}


def language_models(options: argparse.Namespace) -> Iterator[Run]:
    """Fine-tuning of the Llama."""
    for seed in options.seeds:
        for setting, spt in LM.items():
            about = {"kind": "lm", "setting": setting}
            yield Run(f"lm-{setting}-{seed}", about, partial(_train_lm, options, seed, _in_paper(spt)))


def starts(options: argparse.Namespace) -> Iterator[Run]:
    """Conversion of the Llama, with the first seed."""
    made: dict[str, tuple[bool, dict[str, Any]]] = {}
    for start, (is_calibrated, differing) in STARTS.items():
        for active in ACTIVE:
            spt = {"attention": False, "num_active_blocks": active} | differing
            made[f"ffn-{start}-{active}"] = is_calibrated, spt
    for fraction in (1 / 8, 1 / 4):
        for granularity in ("token", "block"):
            spt = {"ffn": False, "top_l": fraction, "granularity": granularity, "block_size": 16}
            made[f"attention-{granularity}-{fraction:g}"] = True, spt
    seed = options.seeds[0]
    for setting, (is_calibrated, spt) in made.items():
        about = {"kind": "starts", "setting": setting}
        yield Run(f"starts-{setting}-{seed}", about, partial(_convert, options, seed, PAPER | spt, is_calibrated))


def encoders(options: argparse.Namespace) -> Iterator[Run]:
    """Fine-tuning of MiniLM."""
    for seed in options.seeds:
        for task in ENCODER_TASKS:
            for setting, spt in ENCODER.items():
                about = {"kind": "encoder", "setting": setting}
                measure = partial(_train_encoder, options, task, seed, _in_paper(spt))
                yield Run(f"encoder-{task}-{setting}-{seed}", about, measure)


def _in_paper(spt: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if spt is None else PAPER | spt


def _train_lm(options: argparse.Namespace, seed: int, spt: dict[str, Any] | None, work: Path) -> dict[str, Any]:
    to_learn_from, held_out = documents(options.data_dir, BBC)
    config = RunConfig(
        task="lm",
        text=(str(write_documents(work / "train.jsonl", to_learn_from)),),
        validation_text=(str(write_documents(work / "test.jsonl", held_out[:SCORED_ARTICLES])),),
        output_dir=str(work / "run"),
        model=options.model,
        block_length=BLOCK_LENGTH,
        batch_size=BATCH_SIZE,
        max_steps=options.steps or LM_STEPS,
        seed=seed,
        settings=LORA,
        spt=spt,
    )
    return _train(config)


def _train_encoder(
    options: argparse.Namespace, task: str, seed: int, spt: dict[str, Any] | None, work: Path
) -> dict[str, Any]:
    config = RunConfig(
        task=task,
        method="lora",
        output_dir=str(work / "run"),
        data_dir=str(options.data_dir),
        few_shot=200,
        max_steps=options.steps or ENCODER_STEPS,
        precision="bf16",
        seed=seed,
        settings={"target_modules": "all-linear"},
        spt=spt,
    )
    return _train(config)


def _train(config: RunConfig) -> dict[str, Any]:
    results = train(config)
    shutil.rmtree(config.output_dir)
    return results


def _convert(
    options: argparse.Namespace, seed: int, spt: dict[str, Any], is_calibrated: bool, work: Path
) -> dict[str, Any]:
    """Perplexity before and after, nothing trained."""
    tokenizer = load_tokenizer(options.model)
    texts = [str(options.data_dir / WIKITEXT / name) for name in ("valid.txt", "test.txt")]
    first, second = (cut(join(read_documents([text]), tokenizer), BLOCK_LENGTH, text) for text in texts)
    scored = evenly_spaced(second, SCORED_BLOCKS)
    model, _ = load_language_model(options.model)
    before = {"dense": perplexity(model, scored, BATCH_SIZE)}
    calibration = evenly_spaced(first, CALIBRATION_BLOCKS) if is_calibrated else None
    sparse = make_sparse(model, read_spt_settings(spt), calibration)
    before["sparse"] = perplexity(model, scored, BATCH_SIZE)
    return {
        "task": "lm",
        "seed": seed,
        "score": before["sparse"]["perplexity"],
        "main_metric": "perplexity",
        "before": before,
        "spt": describe(sparse),
        "is_calibrated": is_calibrated,
        "block_length": BLOCK_LENGTH,
        "num_validation_tokens": scored.numel(),
        "data_fingerprints": fingerprints(texts),
        "environment": environment(),
    }
