"""Which settings make the parents of the last memory specialise: BBC News, 5 parents, 1 child, MiniLM.

    python -m sparsepeft_research.experiments.figure2_search --data-dir DATA [--trials top_k_2 ...]

Every trial is trained with the test part left alone and looked at on the validation part. A result goes to
``research/results/figure2_search/``; one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from typing import Any

from sparsepeft.inspection import LayerReport, inspect_run
from sparsepeft.provenance import environment
from sparsepeft.training import RunConfig, train
from sparsepeft_research.experiments import run_once
from sparsepeft_research.reproduction.figure2 import AnnealTopK
from sparsepeft_research.results import RESULTS

# What differs from the first. `learning_rate` and `recipe` are the run's, `anneal` lets K fall from P while training;
# the rest are settings of the memory.
TRIALS: dict[str, dict[str, Any]] = {
    "top_k_2": {},
    "top_k_3": {"top_k": 3},
    "lr_1e-3": {"learning_rate": 1e-3},
    "lr_1e-2": {"learning_rate": 1e-2},
    "balance_0.01": {"load_balancing_coef": 0.01},
    "balance_0.1": {"load_balancing_coef": 0.1},
    "keys_0.1": {"initializer_range": 0.1},
    "values_0.02": {"value_initializer_range": 0.02},
    "anneal_5_to_2": {"anneal": True},
    "anneal_balance_0.01": {"anneal": True, "load_balancing_coef": 0.01},
    "recipe_paper": {"recipe": "paper"},
    "anneal_recipe_paper": {"anneal": True, "recipe": "paper"},
    "last_layer_only": {"layers_to_transform": [5]},
}


def main() -> None:
    """Run the trials that have no result yet, then print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for trial in options.trials:
        file = RESULTS / "figure2_search" / f"{trial}-{options.epochs:g}ep-{options.max_length}-seed{options.seed}.json"
        run_once(file, partial(_run, options, TRIALS[trial]))
        result = json.loads(file.read_text())
        last, fresh = result["trained"][-1], result["untrained"][-1]
        print(
            f"{file.stem:<34} accuracy {result['selection_accuracy']:.4f}  NMI {last['nmi_documents']:.3f} "
            f"(untrained {fresh['nmi_documents']:.3f})  purest {last['purest']}  documents {last['documents']}",
            flush=True,
        )


def _run(options: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {"num_parents": 5, "num_children": 1, "top_k": 2, **changes}
    memory = {key: value for key, value in settings.items() if key not in ("anneal", "learning_rate", "recipe")}
    with tempfile.TemporaryDirectory() as output:
        config = RunConfig(
            task="bbc-news",
            output_dir=output,
            data_dir=options.data_dir,
            epochs=options.epochs,
            max_length=options.max_length,
            precision=options.precision,
            seed=options.seed,
            recipe=settings.get("recipe", "best"),
            learning_rate=settings.get("learning_rate"),
            score_on="selection",
            settings=memory,
        )
        results = train(config, [AnnealTopK()] if "anneal" in settings else [])
        report = inspect_run(output, split="validation", compare_untrained=True)
    assert report.untrained is not None
    return {
        "settings": settings,
        "epochs": options.epochs,
        "max_length": options.max_length,
        "precision": options.precision,
        "seed": options.seed,
        "selection_accuracy": results["score"],
        "split": "validation",
        "trained": [_summary(layer) for layer in report.layers],
        "untrained": [_summary(layer) for layer in report.untrained.layers],
        "environment": environment(),
    }


def _summary(layer: LayerReport) -> dict[str, Any]:
    purest = layer.purest_parent()
    return {
        "layer": layer.index,
        "nmi_documents": layer.nmi_documents,
        "nmi_positions": layer.nmi_positions,
        "gate_entropy": layer.gate_entropy,
        "moved": layer.moved,
        "dead_parents": layer.dead_parents,
        "documents": [parent.documents for parent in layer.parents],
        "purity": [parent.purity for parent in layer.parents],
        "main_label": [parent.main_label for parent in layer.parents],
        "purest": f"{purest.purity:.0%} {purest.main_label}, {purest.documents} documents" if purest else None,
    }


if __name__ == "__main__":
    main()
