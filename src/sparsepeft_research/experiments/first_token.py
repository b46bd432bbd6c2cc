"""Which states of a frozen backbone say something about a task: those of the first token, or the mean of all.

    python -m sparsepeft_research.experiments.first_token --data-dir DATA --models FOLDER [FOLDER ...]

The head for classification of BERT, RoBERTa and MPNet reads the first token. A backbone that was trained on to embed
sentences by the mean of their tokens may have nothing there. For each task a linear probe (logistic regression, or
ridge regression for values; regularized by cross-validation) is fitted to the last layer's states of 200 training
examples, five draws of them, and scored on validation texts; and for each layer, how far its states of the first token,
and their means, vary between texts, over their root mean square. Results are in ``research/results/first_token/``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.inference.encoding import batches_by_length
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.provenance import environment
from sparsepeft.tasks import TaskSpec, few_shot, load_task, subsample
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS

TASKS = ("cola", "sst2", "mrpc", "stsb", "qnli", "rte")
NUM_EXAMPLES, NUM_DRAWS, NUM_POOL, NUM_SCORED, NUM_SPREAD = 200, 5, 600, 500, 100
MAX_LENGTH, BATCH_SIZE, SEED = 128, 32, 42


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="with the folders of GLUE's tasks")
    parser.add_argument("--models", nargs="+", required=True, help="folders or hub ids")
    arguments = parser.parse_args()
    for name in arguments.models:
        path = RESULTS / "first_token" / f"{Path(name).name}.json"
        run_once(path, partial(measure, name, arguments.data_dir))


def measure(model_name: str, data_dir: str | None, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
    """The result of a model."""
    name = resolve_model(model_name)
    tokenizer = load_tokenizer(name)
    model = AutoModel.from_pretrained(name).eval()
    results = {}
    for task in tasks:
        data = load_task(task, data_dir=data_dir)
        pool, scored = (
            subsample(part, count, SEED) for part, count in ((data.train, NUM_POOL), (data.validation, NUM_SCORED))
        )
        found = [states(model, tokenizer, part, data.spec) for part in (pool, scored)]
        results[task] = {
            read: probe(data.spec, pool, found[0][read], scored, found[1][read]) for read in ("first", "mean")
        } | {"spread": spread(model, tokenizer, scored.select(range(min(NUM_SPREAD, len(scored)))), data.spec)}
    return {
        "measured": "first_token",
        "seed": SEED,
        "settings": {
            "model": describe_backbone(name),
            "num_examples": NUM_EXAMPLES,
            "num_draws": NUM_DRAWS,
            "num_scored": NUM_SCORED,
            "max_length": MAX_LENGTH,
            "precision": "bfloat16 products; the spread float32",
        },
        "results": results,
        "environment": environment(),
    }


@torch.inference_mode()
def states(model: Any, tokenizer: Any, part: Dataset, spec: TaskSpec) -> dict[str, np.ndarray]:
    """Of each text the last layer's state of the first token, and the mean of all, (N, D)."""
    texts = [part[column][:] for column in spec.text_columns]
    lengths = [sum(map(len, row)) for row in zip(*texts, strict=True)]
    found = {read: np.zeros((len(part), model.config.hidden_size), np.float32) for read in ("first", "mean")}
    for rows in batches_by_length(lengths, max_rows=BATCH_SIZE):
        batch = _encode(tokenizer, [[column[row] for row in rows] for column in texts])
        with torch.autocast("cpu", torch.bfloat16):
            last = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        found["first"][rows] = last[:, 0].numpy()
        found["mean"][rows] = ((last * mask).sum(1) / mask.sum(1)).numpy()
    return found


def probe(spec: TaskSpec, pool: Dataset, known: np.ndarray, scored: Dataset, asked: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over draws of a linear probe's main metric."""
    numbered = pool.add_column("place", range(len(pool)))
    scores = []
    for seed in range(NUM_DRAWS):
        drawn = few_shot(numbered, spec, NUM_EXAMPLES, seed)
        inputs, labels = known[drawn["place"][:]], np.array(drawn["label"][:])
        if spec.label_names is None:
            fitted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11))).fit(inputs, labels)
            answers = fitted.predict(asked)
        else:
            regression = LogisticRegressionCV(Cs=np.logspace(-5, 0, 11), cv=5, max_iter=2000)
            fitted = make_pipeline(StandardScaler(), regression).fit(inputs, labels)
            answers = fitted.predict_log_proba(asked)
        scores.append(spec.compute_metrics(answers, scored["label"][:])[spec.main_metric])
    return {"mean": statistics.fmean(scores), "std": statistics.stdev(scores)}


@torch.inference_mode()
def spread(model: Any, tokenizer: Any, part: Dataset, spec: TaskSpec) -> dict[str, list[float]]:
    """By layer, the embeddings first: what of the states varies between texts, see the module."""
    batch = _encode(tokenizer, [part[column][:] for column in spec.text_columns])
    mask = batch["attention_mask"][..., None]
    found: dict[str, list[float]] = {"first": [], "mean": []}
    for layer in model(**batch, output_hidden_states=True).hidden_states:
        for read, values in (("first", layer[:, 0]), ("mean", (layer * mask).sum(1) / mask.sum(1))):
            found[read].append(float(values.std(0).pow(2).mean().sqrt() / values.pow(2).mean().sqrt()))
    return found


def _encode(tokenizer: Any, texts: list[list[str]]) -> Any:
    return tokenizer(*texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")


if __name__ == "__main__":
    main()
