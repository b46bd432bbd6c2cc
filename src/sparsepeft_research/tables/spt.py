"""Tables of SPT: what sparsity costs in quality, what it saves of a fine-tuning step, and the begin-of-text token."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, ratio, spread, table
from sparsepeft_research.results import Result, read_folder, read_result

Runs = dict[str, dict[int | None, Result]]  # by setting, then seed
_STEPS = ("spt_stack.json", "spt_stack_8192.json", "spt_gemma.json")
_FIRST = ("dense", "both", "attention", "ffn")


def step(results: Path) -> str:
    """Time and memory of a fine-tuning step: of random stacks, lengths in files of their own, and of a real model."""
    folder = results / "benchmarks"
    parts, stacks = [], ""
    for name in _STEPS:
        if not (folder / name).exists():
            continue
        report = read_result(folder / name)
        settings = report.settings
        weights = "random weights" if settings.get("is_random", True) else "its weights"
        # Files of before there were other forms do not say which.
        values = ", ".join(settings.get("values", ["routed"]))
        similarity = settings.get("similarity", "matches").replace("_", " ")
        about = (
            f"{settings['layers']} layers of {settings['model']} ({weights}, no language-modelling head), "
            f"LoRA on queries and values, batch {settings['batch_size']}, {settings['dtype']}, L = "
            f"{settings['top_l']:g} of the length by {settings['granularity']}, keys by {similarity}, FFNs {values}; "
            f"{report.machine}; medians of alternating steps. Peak is what a step allocates above weights and "
            "optimizer state. By `sparsepeft benchmark spt`."
        )
        parts += [about] if about != stacks else []
        stacks = about
        for one in report.results:
            parts.append(table(*step_table(one)))
            parts += [f"{name} was left out: {reason}." for name, reason in one["left_out"].items()]
    return paragraphs(*parts)


def step_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one length."""
    rows = [
        [
            name,
            f"{candidate['step']['median_ms']:.0f}",
            ratio(candidate["speedup_over"].get("sdpa")),
            f"{candidate['peak_bytes'] / 2**20:.0f}",
            ratio(candidate["peak_of"].get("sdpa")),
            ratio(candidate["peak_of"].get("eager")),
        ]
        for name, candidate in result["candidates"].items()
    ]
    return [f"{result['length']} tokens", "ms", "speed-up", "peak MiB", "of SDPA's", "of eager's"], rows


def step_memory(results: Path) -> str:
    """Where the memory of a whole step goes, by weights' dtype."""
    parts: list[str] = []
    for report in read_folder(results / "benchmarks", "step_memory_*.json").values():
        settings, rows = report.settings, []
        for one in report.results:
            parts_of_step = ("weights", "adapter_and_optimizer", "kept_activations", "loss", "peak")
            mebibytes = [f"{one[f'{name}_bytes'] / 2**20:,.0f}" for name in parts_of_step]
            rows.append([one["candidate"], *mebibytes, ratio(one["share_of_transformers"])])
        header = [f"{report.results[0]['dtype']}, MiB", "weights", "adapter, optimizer", "kept activations"]
        about = (
            f"A whole LoRA step of {settings['model']} (r = {settings['rank']}, {settings['layers_of_lora']}), "
            f"{settings['length']:,} tokens, AdamW: tensors on the CPU. `kept activations` is what the layers keep for "
            "backward, `loss` what head and loss take above that, `peak` the most that is there at one time, weights "
            "and all. By `sparsepeft benchmark step_memory`."
        )
        parts += [*([] if parts else [about]), table([*header, "loss", "peak", "of transformers'"], rows)]
    return paragraphs(*parts)


def language_model(results: Path) -> str:
    """Perplexity of a small Llama, fine-tuned dense and sparse."""
    runs = _runs(results, "lm")
    rows = []
    for setting, by_seed in _in_order(runs):
        repeats = list(by_seed.values())
        before = [run.results["before"] for run in repeats]
        spt = repeats[0].results["spt"]
        rows.append(
            [
                setting,
                str(spt["config"]["top_l"]) if spt and spt["config"]["attention"] else "",
                str(len(repeats)),
                spread([each["dense"]["perplexity"] for each in before]),
                spread([each["sparse"]["perplexity"] for each in before if "sparse" in each]),
                spread([run.settings["score"] for run in repeats]),
                _change(by_seed, runs["dense"]),
            ]
        )
    first = next(iter(runs["dense"].values()))
    return paragraphs(
        f"A Llama ({first.results['model']}) fine-tuned on BBC News with LoRA, {_steps(runs)} steps, blocks of "
        f"{first.settings['block_length']} tokens: perplexity on {first.settings['num_validation_tokens']:,} tokens of "
        "held-out articles, mean and standard deviation over seeds. Keys by matches, FFNs routed, as in the paper: "
        "`both` is L = n/8 by token and half of 8 clustered blocks; the others differ in what their names say. The "
        "change is against LoRA on the dense model, seed by seed. By `python -m "
        "sparsepeft_research.experiments.spt_quality lm --data-dir DATA --model LLAMA`.",
        table(["setting", "L", "seeds", "dense, before", "sparse, before", "fine-tuned", "change"], rows),
    )


def encoders(results: Path) -> str:
    """Scores of MiniLM, fine-tuned dense and sparse."""
    rows = []
    by_task = {task: _runs(results, "encoder", task) for task in ("mrpc", "sst2")}
    for task, runs in by_task.items():
        for setting, by_seed in _in_order(runs):
            configs = [run.results["spt"]["config"] for run in by_seed.values() if "spt" in run.results]
            lengths = sorted({config["top_l"] for config in configs if config["attention"]})
            scores = spread([100 * run.settings["score"] for run in by_seed.values()])
            about = [f"{task}, {setting}", ", ".join(map(str, lengths)), str(len(by_seed))]
            rows.append([*about, scores, _change(by_seed, runs["dense"])])
    first = next(iter(by_task["mrpc"]["dense"].values()))
    return paragraphs(
        f"MiniLM, LoRA, {first.settings['num_train']} training examples, {_steps(by_task['mrpc'])} steps; keys by "
        "matches, FFNs routed, as in the paper: the task's main metric x 100 on the validation set. L is a quarter of "
        "the longest text of the calibration batch, so it differs by seed.",
        table(["task, setting", "L", "seeds", "score", "change"], rows),
    )


def conversion(results: Path) -> str:
    """Perplexity right after conversion."""
    rows = []
    for run in read_folder(results / "spt_quality", "starts-*.json").values():
        dense, sparse = (run.results["before"][kind]["perplexity"] for kind in ("dense", "sparse"))
        report = run.results["spt"]["report"]
        errors = list(report["feed_forward_error"].values()) or list(report["attention_error"].values())
        rows.append(
            [
                run.results["experiment"]["setting"],
                f"{sparse:.1f}",
                f"{100 * (sparse / dense - 1):+.1f} %",
                f"{statistics.mean(errors):.3f}" if errors else "",
                f"{statistics.mean(report['recall'].values()):.3f}" if report["recall"] else "",
            ]
        )
    return paragraphs(
        f"Right after conversion, nothing trained; keys by matches, FFNs routed: perplexity on "
        f"{run.settings['num_validation_tokens']:,} tokens of WikiText-2's test part, where the dense model's is "
        f"{dense:.1f}. Names of FFNs: what blocks and routers are made from (`activity` of a calibration batch or the "
        "`weights`; `contiguous` blocks or clusters; `compensated` with a linear map of rank 32 in the place of the "
        "blocks that are not used), and blocks in use of 8. Of attention: granularity, and L over n.",
        table(["setting", "perplexity", "change", "mean error of a layer", "recall"], rows),
    )


def begin_token(results: Path) -> str:
    """Perplexity with and without the begin-of-text token."""
    runs = read_folder(results / "begin_token")
    rows = []
    for length in sorted({run.settings["block_length"] for run in runs.values()}):
        for kind in ("dense", "sparse"):
            values = [runs[f"{length}-{which}"].results[kind] for which in ("without", "with")]
            rows.append([f"blocks of {length}, {kind}", *(f"{value:,.1f}" for value in values)])
    first = runs["64-with"]
    return paragraphs(
        f"{first.settings['model']}, whose tokenizer puts `{first.settings['bos_token']}` before every text: "
        f"perplexity on about {round(max(run.settings['num_scored_tokens'] for run in runs.values()), -3):,} tokens of "
        "WikiText-2's test part, cut into blocks that begin with the token or do not; sparse in the "
        "paper's forms (n/8 keys by matches, by token; routed FFNs, half of 8 blocks), before any fine-tuning. By "
        "`python -m sparsepeft_research.experiments.begin_token --data-dir DATA --model GEMMA`.",
        table(["", "without", "with"], rows),
    )


def _runs(results: Path, kind: str, task: str = "") -> Runs:
    runs: Runs = {}
    for run in read_folder(results / "spt_quality", f"{kind}-{task}*.json").values():
        runs.setdefault(run.results["experiment"]["setting"], {})[run.seed] = run
    return runs


def _in_order(runs: Runs) -> list[tuple[str, dict[int | None, Result]]]:
    return sorted(runs.items(), key=lambda run: (_FIRST.index(run[0]) if run[0] in _FIRST else len(_FIRST), run[0]))


def _change(by_seed: dict[int | None, Result], dense: dict[int | None, Result]) -> str:
    """Of the score, in per cent of the dense model's with the same seed."""
    shared = by_seed.keys() & dense.keys()
    if not shared or by_seed is dense:
        return ""
    changes: list[Any] = [100 * (by_seed[s].settings["score"] / dense[s].settings["score"] - 1) for s in shared]
    return spread(changes, sign="+") + " %"


def _steps(runs: Runs) -> str:
    return " or ".join(str(n) for n in sorted({run.settings["steps"] for by in runs.values() for run in by.values()}))
