"""What the begin-of-text token at the head of each block is worth: perplexity with and without it.

    python -m sparsepeft_research.experiments.begin_token --data-dir DATA --model GEMMA

The model's perplexity on the first tokens of WikiText-2's test part, cut into blocks of each length: dense, and sparse
in the paper's forms, calibrated on blocks of the validation part that begin in the same way. Then, in blocks of
the shortest length, after LoRA has been trained for a few steps on the validation part. With the token a block holds
one token of the text less, so that all of the text's tokens are predicted; without it the first of each block is not.

Results go to ``research/results/begin_token/``, one file for each length and way to begin. What is there is not
repeated.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsepeft.devices import keep_freed_memory
from sparsepeft.methods.language_models import CALIBRATION_BLOCKS, load_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.sparse import describe, make_sparse
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import begin_token, cut, evenly_spaced, fingerprints, join, num_predicted, read_documents
from sparsepeft.spt import SptConfig
from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS

BATCH_TOKENS = 512
SEED = 42


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="with wikitext-2")
    parser.add_argument(
        "--model", required=True, help="a language model whose tokenizer begins texts: folder or hub id"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 512], help="of the blocks, with the token")
    parser.add_argument("--num-tokens", type=int, default=8192, help="of the text that perplexity is measured on")
    parser.add_argument("--steps", type=int, default=20, help="of LoRA; 0 trains nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "begin_token", help="folder of the results")
    options = parser.parse_args()
    keep_freed_memory()
    for length in sorted(options.lengths):
        for has_token in (True, False):
            _once(options, f"{length}-{'with' if has_token else 'without'}", _convert, length, has_token)
    for has_token in (True, False) if options.steps else ():
        _once(options, f"lora-{'with' if has_token else 'without'}", _train, min(options.lengths), has_token)


def _once(options: argparse.Namespace, name: str, measure: Any, length: int, has_token: bool) -> None:
    run_once(options.results / f"{name}.json", partial(measure, options, length, has_token), {"name": name})


def _convert(options: argparse.Namespace, length: int, has_token: bool) -> dict[str, Any]:
    """Nothing is trained."""
    tokenizer = load_tokenizer(options.model)
    files = [str(options.data_dir / "wikitext-2" / name) for name in ("valid.txt", "test.txt")]
    begin = begin_token(tokenizer, has_token)

    def blocks(file: str, num_tokens: int | None = None) -> Tensor:
        return cut(join(read_documents([file]), tokenizer)[:num_tokens], length, file, begin)

    calibration = evenly_spaced(blocks(files[0]), CALIBRATION_BLOCKS)
    scored = blocks(files[1], options.num_tokens)
    model, _ = load_language_model(options.model)
    batch_size = max(1, BATCH_TOKENS // length)
    dense = perplexity(model, scored, batch_size)["perplexity"]
    config = SptConfig(similarity="matches", values="routed")
    sparse = make_sparse(model, config, calibration)
    return {
        "model": Path(options.model).name,
        "seed": config.seed,
        "block_length": length,
        "bos_token": None if begin is None else tokenizer.convert_ids_to_tokens(begin),
        "num_scored_tokens": num_predicted(scored),
        "perplexity": {"dense": dense, "sparse": perplexity(model, scored, batch_size)["perplexity"]},
        "spt": describe(sparse),
        "data_fingerprints": fingerprints(files),
        "environment": environment(),
    }


def _train(options: argparse.Namespace, length: int, has_token: bool) -> dict[str, Any]:
    """The same text in the same order, dense, by LoRA's recipe."""
    tokenizer = load_tokenizer(options.model)
    texts = options.data_dir / "wikitext-2"
    with tempfile.TemporaryDirectory() as work:
        held_out = Path(work) / "held_out.txt"
        ids = join(read_documents([str(texts / "test.txt")]), tokenizer)[: options.num_tokens]
        held_out.write_text(str(tokenizer.decode(ids)), encoding="utf-8")
        config = RunConfig(
            task="lm",
            text=(str(texts / "valid.txt"),),
            validation_text=(str(held_out),),
            output_dir=str(Path(work) / "run"),
            model=options.model,
            block_length=length,
            bos_token=has_token,
            batch_size=max(1, BATCH_TOKENS // length),
            max_steps=options.steps,
            seed=SEED,
        )
        results = train(config)
    results["perplexity"] = {"dense": results["before"]["dense"]["perplexity"], "trained": results["score"]}
    return results


if __name__ == "__main__":
    main()
