"""What training low-rank updates of routed FFNs before fine-tuning gains over regression alone.

    python -m sparsepeft_research.experiments.spt_reconstruction --data-dir DATA --models LLAMA GEMMA minilm

For each model a file with the relative error of some layers' outputs (half of 8 blocks, each layer with the inputs that
it has in the dense model) on the text that was calibrated on and on other text; ``--perplexity`` converts all layers of
causal models, too. WikiText-2: calibrated on the validation part, measured on the test part. Nothing is chosen on it.
Results go to ``research/results/spt_reconstruction/``; what is there is not repeated.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from sparsepeft.backbones import resolve_model
from sparsepeft.methods.language_models import load_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.methods.sparse import describe, make_sparse
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.provenance import environment
from sparsepeft.runs.corpus import begin_token, cut, evenly_spaced, fingerprints, join, read_documents
from sparsepeft.spt import SptConfig
from sparsepeft.spt.calibration import initial_router
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.report import watching
from sparsepeft_research.experiments import run_once
from sparsepeft_research.results import RESULTS

BLOCK_LENGTH = 512
CALIBRATION_BLOCKS, ERROR_BLOCKS, SCORED_BLOCKS = 8, 4, 64
BASE = {"attention": False, "values": "routed", "num_active_blocks": 4}
# Of SptConfig, by name; regression alone stands first.
SETTINGS: dict[str, dict[str, int]] = {
    "router": {},
    "map-32": {"compensation_rank": 32},
    "map-128": {"compensation_rank": 128},  # costs what map-32-update-16 does
    "update-32": {"reconstruction_rank": 32},
    "map-32-update-8": {"compensation_rank": 32, "reconstruction_rank": 8},
    "map-32-update-16": {"compensation_rank": 32, "reconstruction_rank": 16},
    "map-32-update-32": {"compensation_rank": 32, "reconstruction_rank": 32},
    "map-32-update-32-100": {"compensation_rank": 32, "reconstruction_rank": 32, "reconstruction_steps": 100},
    "map-32-update-32-400": {"compensation_rank": 32, "reconstruction_rank": 32, "reconstruction_steps": 400},
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="with wikitext-2")
    parser.add_argument("--models", nargs="+", required=True, help="folders, hub ids, or minilm")
    parser.add_argument("--layers", nargs="+", type=int, help="positions; default: first, middle and last")
    parser.add_argument("--perplexity", action="store_true", help="convert all layers of causal models, too")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS / "spt_reconstruction", help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for path in options.models:
        for kind, measure in (("layers", _layers), *([("perplexity", _perplexity)] if options.perplexity else [])):
            file = options.results / f"{kind}-{Path(path).name}-{options.seed}.json"
            run_once(file, partial(measure, resolve_model(path), options), {"kind": kind, "model": Path(path).name})


def _layers(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Errors of single layers, by setting."""
    model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    known, other = _texts(path, options.data_dir)
    feed_forwards = find_feed_forwards(model)
    last = len(feed_forwards) - 1
    positions = options.layers or sorted({0, last // 2, last})
    chosen = [feed_forwards[position] for position in positions]
    seen = _seen(model, chosen, evenly_spaced(known, CALIBRATION_BLOCKS))
    others = _seen(model, chosen, evenly_spaced(other, ERROR_BLOCKS))
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for position, feed_forward in zip(positions, chosen, strict=True):
        for name in options.settings:
            config = SptConfig(**BASE | SETTINGS[name], seed=options.seed)  # type: ignore[arg-type]
            start = initial_router(feed_forward, config, {}, seen)
            assert start is not None  # of routed values
            routed = RoutedFeedForward(feed_forward, start, config, SparseContext(config)).eval()
            errors.setdefault(name, {})[str(position)] = {
                "calibration": _error(routed, *seen[feed_forward.name]),
                "other": _error(routed, *others[feed_forward.name]),
            }
            routed.release()
    return _result("spt_reconstruction.layers", options, errors) | {
        "num_calibration_tokens": CALIBRATION_BLOCKS * BLOCK_LENGTH,
        "num_other_tokens": ERROR_BLOCKS * BLOCK_LENGTH,
    }


def _perplexity(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the dense model, and of the one whose FFNs are all routed, by setting."""
    known, other = _texts(path, options.data_dir)
    scored = evenly_spaced(other, SCORED_BLOCKS)
    model, _ = load_language_model(path)
    figures: dict[str, Any] = {"dense": perplexity(model, scored, 8)}
    for name in options.settings:
        model, _ = load_language_model(path)
        config = SptConfig(**BASE | SETTINGS[name], seed=options.seed)  # type: ignore[arg-type]
        sparse = make_sparse(model, config, evenly_spaced(known, CALIBRATION_BLOCKS))
        figures[name] = perplexity(model, scored, 8) | {"report": describe(sparse)["report"]}
    result = _result("spt_reconstruction.perplexity", options, figures)
    return result | {"num_scored_tokens": scored.numel()}


def _result(measured: str, options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "measured": measured,
        "seed": options.seed,
        "settings": {
            "block_length": BLOCK_LENGTH,
            "base": BASE,
            "differing": {name: SETTINGS[name] for name in options.settings},
        },
        "results": results,
        "data_fingerprints": fingerprints(_files(options.data_dir)),
        "environment": environment(),
    }


def _files(data_dir: Path) -> list[str]:
    return [str(data_dir / "wikitext-2" / name) for name in ("valid.txt", "test.txt")]


def _texts(path: str, data_dir: Path) -> tuple[Tensor, Tensor]:
    """Blocks of the validation and of the test part."""
    tokenizer = load_tokenizer(path)
    known, other = (
        cut(join(read_documents([text]), tokenizer), BLOCK_LENGTH, text, begin_token(tokenizer))
        for text in _files(data_dir)
    )
    return known, other


@torch.no_grad()
def _seen(model: nn.Module, feed_forwards: list[FeedForward], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    with watching(feed_forwards) as seen:
        model(input_ids=ids)
    return seen


@torch.no_grad()
def _error(routed: RoutedFeedForward, inputs: Tensor, expected: Tensor) -> float:
    return float((routed(inputs) - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
