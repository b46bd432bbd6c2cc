"""What sparsity (SPT) costs in quality: LoRA on a sparse model against LoRA on the dense one.

    python -m sparsepeft_research.experiments.spt_quality --data-dir DATA --model LLAMA

Three kinds of runs, all with LoRA:

- ``lm``: a small Llama is fine-tuned on BBC News as a language model. What is in ``LM`` differs from the base setting
  (attention and FFN sparse, L = n/8 by token, half of 8 clustered blocks) in one thing each, has one mechanism alone,
  or is mild in all. Perplexity on held-out articles: dense, right after conversion, after fine-tuning.
- ``conversion``: no training. One mechanism alone, and where the FFNs' blocks and routers start from: the weights
  (clusters of like rows, centres) or a calibration batch (clusters of what fires together, regression), also with a
  linear map in the place of the blocks that are not used (``compensated``). Perplexity on WikiText-2, from which the
  Llama was made: calibrated on the validation part, measured on the test part. Its blocks begin with no begin-of-text
  token, as in its training; ``begin_token.py`` is about models that want one.
- ``encoder``: MiniLM on GLUE tasks, 200 examples. Texts are short, so L is a fraction of the calibration batch's
  length.

The held-out articles are the task's test part; nothing is chosen on it. Results go to
``research/results/spt_quality/``, one file a run. What is there is not repeated, and processes may share the work;
seed by seed, what matters most first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsepeft.devices import keep_freed_memory
from sparsepeft.methods.language_models import CALIBRATION_BLOCKS, load_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.sparse import describe, make_sparse, read_spt_settings
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import cut, evenly_spaced, fingerprints, join, read_documents
from sparsepeft.tasks import load_task
from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS

BLOCK_LENGTH, BATCH_SIZE = 512, 8
SCORED_BLOCKS = 64  # of conversions
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Of SptConfig; None is the dense model. A block of 64 keys would be all of L = n/8 here.
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


class Run(NamedTuple):
    """One run: its kind, the setting's name, what becomes sparse (by what calibration), and the seed."""

    kind: str
    setting: str
    spt: dict[str, Any] | None
    seed: int
    task: str = ""  # of an encoder
    is_calibrated: bool = True

    def file(self, folder: Path) -> Path:
        """Where its result is, or will be."""
        parts = (self.kind, self.task, self.setting, str(self.seed))
        return folder / ("-".join(part for part in parts if part) + ".json")


def runs(kinds: list[str], seeds: list[int]) -> Iterator[Run]:
    """All runs in their order: for each seed first the dense model and the base settings."""
    for seed in seeds:
        made = [Run("lm", name, spt, seed) for name, spt in LM.items()]
        encoders = [Run("encoder", name, spt, seed, task) for task in ENCODER_TASKS for name, spt in ENCODER.items()]
        conversions = list(_conversions(seed)) if seed == seeds[0] else []
        yield from (run for run in [*made[:4], *conversions, *encoders, *made[4:]] if run.kind in kinds)


def _conversions(seed: int) -> Iterator[Run]:
    for start, (is_calibrated, differing) in STARTS.items():
        for active in ACTIVE:
            spt = {"attention": False, "num_active_blocks": active} | differing
            yield Run("conversion", f"ffn-{start}-{active}", spt, seed, is_calibrated=is_calibrated)
    for fraction in (1 / 8, 1 / 4):
        for granularity in ("token", "block"):
            spt = {"ffn": False, "top_l": fraction, "granularity": granularity, "block_size": 16}
            yield Run("conversion", f"attention-{granularity}-{fraction:g}", spt, seed)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="with bbc-news and the GLUE tasks")
    parser.add_argument("--model", required=True, help="the Llama of the kinds lm and conversion: folder or hub id")
    parser.add_argument("--encoder", help="of the kind encoder; default: the bundled MiniLM")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--settings", nargs="+", help="only these, by their names in LM and ENCODER")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=100, help="of lm")
    parser.add_argument("--encoder-steps", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=60, help="articles that perplexity is measured on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS / "spt_quality", help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    wanted = [run for run in runs(options.kinds, options.seeds) if run.setting in (options.settings or [run.setting])]
    for run in wanted:
        about = {"kind": run.kind, "setting": run.setting}
        with tempfile.TemporaryDirectory() as work:
            run_once(run.file(options.results), partial(_KINDS[run.kind], run, options, Path(work)), about)


def _train_lm(run: Run, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    text, held_out = _articles(options, work)
    config = RunConfig(
        task="lm",
        text=(str(text),),
        validation_text=(str(held_out),),
        output_dir=str(work / "run"),
        model=options.model,
        block_length=BLOCK_LENGTH,
        batch_size=BATCH_SIZE,
        max_steps=options.steps,
        seed=run.seed,
        settings=LORA,
        spt=run.spt,
    )
    return train(config)


def _train_encoder(run: Run, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    config = RunConfig(
        task=run.task,
        method="lora",
        output_dir=str(work / "run"),
        model=options.encoder,
        data_dir=str(options.data_dir),
        few_shot=200,
        max_steps=options.encoder_steps,
        precision="bf16",
        seed=run.seed,
        settings={"target_modules": "all-linear"},
        spt=run.spt,
    )
    return train(config)


def _convert(run: Run, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Perplexity before and after, nothing trained."""
    tokenizer = load_tokenizer(options.model)
    texts = [str(options.data_dir / "wikitext-2" / name) for name in ("valid.txt", "test.txt")]
    first, second = (cut(join(read_documents([text]), tokenizer), BLOCK_LENGTH, text) for text in texts)
    scored = evenly_spaced(second, SCORED_BLOCKS)
    model, _ = load_language_model(options.model)
    before = {"dense": perplexity(model, scored, BATCH_SIZE)}
    calibration = evenly_spaced(first, CALIBRATION_BLOCKS) if run.is_calibrated else None
    sparse = make_sparse(model, read_spt_settings(run.spt), calibration)
    before["sparse"] = perplexity(model, scored, BATCH_SIZE)
    return {
        "task": "lm",
        "seed": run.seed,
        "score": before["sparse"]["perplexity"],
        "main_metric": "perplexity",
        "before": before,
        "spt": describe(sparse),
        "is_calibrated": run.is_calibrated,
        "block_length": BLOCK_LENGTH,
        "num_validation_tokens": scored.numel(),
        "data_fingerprints": fingerprints(texts),
        "environment": environment(),
    }


def _articles(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """Files with the training articles, and some of the test part; articles that occur twice are in neither twice."""
    data: Any = load_task("bbc-news", data_dir=options.data_dir)
    files = []
    for name, texts in (("train", data.train["text"][:]), ("test", data.test["text"][: options.held_out])):
        file = work / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        files.append(file)
    return files[0], files[1]


_KINDS: dict[str, Callable[[Run, argparse.Namespace, Path], dict[str, Any]]] = {
    "lm": _train_lm,
    "conversion": _convert,
    "encoder": _train_encoder,
}


if __name__ == "__main__":
    main()
