"""Tables of what sparsity (SPT) costs a real language model: before training, after LoRA, within a budget."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, ratio, spread, table
from sparsepeft_research.results import Result, read_folder, read_result

_COMMAND = "`python -m sparsepeft_research.experiments.spt_quality {} --data-dir DATA --model GEMMA`"
_MODEL = "gemma-3-270m"
_DENSE = "dense"


def conversion(results: Path) -> str:
    """Perplexity with sparse attention, nothing trained."""
    runs = list(read_folder(results / "spt_quality" / _MODEL, "conversion-*.json").values())
    by_text: dict[tuple[str, int], dict[str, Result]] = {}
    for run in runs:
        about = run.results["experiment"]
        by_text.setdefault((about["text"], about["length"]), {})[about["setting"]] = run
    if not runs:
        return ""
    settings = list(dict.fromkeys(name for of in by_text.values() for name in of if name != _DENSE))
    rows = []
    for (text, length), of in sorted(by_text.items()):
        losses = of[_DENSE].results["losses"]
        changes = [_change(of[name].results["losses"], losses) if name in of else "" for name in settings]
        tokens = f"{of[_DENSE].settings['num_scored_tokens']:,}"
        rows.append([f"{text}, {length:,} tokens", tokens, f"{of[_DENSE].settings['score']:.1f}", *changes])
    return paragraphs(
        f"{_MODEL}, right after conversion: all layers attend to n/8 keys, by token or by blocks of n/32, FFNs are "
        "dense. Perplexity of the dense model on the test part, and its change, with the standard error over blocks of "
        f"text. By {_COMMAND.format('conversion')}.",
        table(["text", "scored", "dense", *(name.replace("-", ", by ") for name in settings)], rows),
    )


def _change(losses: list[float], dense: list[float]) -> str:
    """Of perplexity, with its standard error, from the losses of the same blocks."""
    pairs = [one - other for one, other in zip(losses, dense, strict=True)]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
    return f"{100 * math.expm1(statistics.mean(pairs)):+.1f} % ± {100 * error:.1f}"


def finetuning(results: Path) -> str:
    """Perplexity after LoRA on the dense and on the sparse model."""
    runs: dict[str, dict[int | None, Result]] = {}
    for run in read_folder(results / "spt_quality" / _MODEL, "finetuning-*.json").values():
        runs.setdefault(run.results["experiment"]["setting"], {})[run.seed] = run
    if not runs:
        return ""
    first = next(iter(runs[_DENSE].values()))
    dense = {seed: run.settings["score"] for seed, run in runs[_DENSE].items()}
    rows = []
    for setting, of in sorted(runs.items(), key=lambda item: (item[0] != _DENSE, item[0])):
        row = [setting, str(len(of))]
        for answering in ("sparse", "dense"):
            scores = {seed: _score(run, answering) for seed, run in of.items()}
            known = {seed: score for seed, score in scores.items() if score is not None}
            changes = [100 * (score / dense[seed] - 1) for seed, score in known.items() if seed in dense]
            row += [spread(list(known.values()), digits=2)]
            row += ["" if setting == _DENSE or not changes else spread(changes, sign="+", digits=2) + " %"]
        rows.append(row)
    cut, how, about = first.results["vocabulary"], first.results["hyperparameters"], first.settings
    before = first.results["before"]["dense"]["perplexity"]
    return paragraphs(
        f"{_MODEL}, LoRA (r={how['adapter']['r']}, all linear layers, learning rate {how['learning_rate']:g}) on BBC "
        f"News, {about['steps']} steps of {how['batch_size']} x {about['block_length']} tokens, {how['precision']}. "
        f"Perplexity on {about['num_validation_tokens']:,} tokens of articles of the test part, {before:.2f} before; "
        "mean and standard deviation over seeds, changes against LoRA on the dense model, seed by seed. The trained "
        "model answers sparse, as it was trained, or dense, with the same adapter. The vocabulary is cut to the "
        f"{cut['kept']:,} of {cut['of']:,} tokens that occur, which lowers perplexity and leaves the layers as they "
        f"are. By {_COMMAND.format('finetuning')}.",
        table(["setting", "seeds", "sparse", "change", "dense", "change"], rows),
    )


def _score(run: Result, answering: str) -> float | None:
    """Perplexity as the dense or the sparse model; a dense model has the one alone."""
    if run.results["spt"] is None:
        return float(run.settings["score"]) if answering == "dense" else None
    by_infer = run.results.get("metrics_by_infer")  # of the same figure where only training is sparse
    return float(by_infer[answering]["validation"]["perplexity"] if by_infer else run.settings["score"])


def budget(results: Path) -> str:
    """What plans for a budget promise, and keep."""
    rows = []
    for file in sorted((results / "spt_quality").glob("*/budget-*.json")):
        run = read_result(file)
        plan, held_out = run.results["plan"], run.results["held_out"]
        changes = [plan["predicted_change"], plan["measured_change"]["calibration"], held_out["change"]]
        rows.append(
            [
                run.results["model"],
                f"{run.results['block_length']:,}",
                f"{100 * plan['budget']:g} %",
                *(f"{100 * change:+.1f} %" for change in changes),
                *(ratio(plan[name]) for name in ("predicted_time", "measured_time")),
                _summary(plan["modules"]),
            ]
        )
    if not rows:
        return ""
    header = ["model", "tokens", "budget", "predicted", "calibration", "held out", "time predicted", "time measured"]
    return paragraphs(
        "Plans that `SptConfig(budget=...)` makes on WikiText-2's validation part: change of perplexity as it adds up "
        "from single layers, as measured on the same text, and on the test part, which no choice has seen; time of a "
        "step through the layers over the dense one's, from single layers and as measured; and what modules have "
        f"become. By {_COMMAND.format('budget')}.",
        table([*header, "modules"], rows),
    )


def _summary(modules: dict[str, Any]) -> str:
    """How many modules became what."""
    kinds = Counter(_words(choice["settings"]) for choice in modules.values())
    return "; ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _words(settings: dict[str, Any]) -> str:
    if settings.get("dense"):
        return "dense"
    if "top_l" in settings:
        return f"with {settings['top_l']} keys by {settings['granularity']}"
    return f"{settings['values']} {settings['num_active_blocks']} of {settings['num_blocks']}"
