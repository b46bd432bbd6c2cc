"""Tables of scores: the paper's tables, options, the search for recipes, what parents specialise in."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.reproduction import paper
from sparsepeft_research.results import read_folder, read_result


def reproduced(results: Path, folder: str, name: str) -> str:
    """What ``sparsepeft reproduce`` wrote, without its heading."""
    return (results / folder / f"{name}.md").read_text(encoding="utf-8").rstrip().partition("\n")[2].strip()


def overview(results: Path, folder: str, name: str) -> str:
    """Method, storage and scores of what ``sparsepeft reproduce`` wrote, and nothing else of it."""
    lines = [line for line in reproduced(results, folder, name).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kept = [i for i, title in enumerate(cells[0]) if title in ("method", "storage") or _is_score(title)]
    rows = [[row[i] for i in kept] for row in cells]
    return table(rows[0], rows[2:])


def beside_paper(results: Path, folder: str) -> str:
    """Few-shot scores beside those that the paper prints for RoBERTa-base, a cell for each task."""
    scores: dict[str, dict[str, list[float]]] = {}
    for run in read_folder(results / folder).values():
        task, metrics = run.settings["task"], run.results["metrics"]["validation"]
        score = metrics["accuracy"] if task == "mrpc" else run.settings["score"]
        scores.setdefault(run.settings["method"], {}).setdefault(task, []).append(100 * score)
    rows = []
    tasks = [task for task in paper.TASKS if any(task in by_task for by_task in scores.values())]
    for method, printed in paper.paper_rows("few-shot").items():
        if not (own := scores.get(method)):
            continue
        means = {task: statistics.mean(own[task]) for task in tasks if task in own}
        cells = [f"{means[task]:.1f} / {printed.scores[task]:.1f}" if task in means else "" for task in tasks]
        both = [f"{statistics.mean(part[task] for task in means):.1f}" for part in (means, printed.scores)]
        rows.append([method, " / ".join(both) if len(means) == len(tasks) else "", *cells])
    return paragraphs(
        "Here / in the paper (its table 3, RoBERTa-base, three seeds); MRPC by its accuracy. The models "
        "differ, too: this one was trained further to embed sentences, see [experiments](../experiments.md).",
        table(["method", f"mean of {len(tasks)}", *tasks], rows),
    )


def options(results: Path) -> str:
    """What the options for faster training do to SPARTAN's scores."""
    baseline = _spartan_scores(results / "few_shot")
    rows = []
    for folder in sorted((results / "options").glob("*")):
        scores = _spartan_scores(folder)
        shared = sorted(scores.keys() & baseline.keys())
        means = [f"{statistics.mean(runs[key] for key in shared):.1f}" for runs in (scores, baseline)]
        rows.append([folder.name, ", ".join(sorted({task for task, _ in shared})), str(len(shared)), *means])
    return paragraphs(
        "SPARTAN's few-shot runs with other options against those above (bf16, memories after all layers), the mean of "
        "the runs that both have. `upper-K` is memories after the K upper layers, the layers below cached.",
        table(["options", "tasks", "runs", "mean score", "without them"], rows),
    )


def recipe_search(results: Path, model: str = "MiniLM") -> str:
    """Every trial of the search for a model's recipes, best first within a method, a table for each way to train."""
    parts = [
        f"{model}, bf16, one seed; scores x 100 on held-out training data. What the trials are, and what came of them: "
        "[experiments.md](../experiments.md). By `python -m sparsepeft_research.experiments.search_recipe --data-dir "
        "DATA`."
    ]
    for folder in sorted(results.glob("search_*")):
        steps = folder.name.removeprefix("search_")
        is_full = steps == "full_data"
        parts.append("All training data (at most 10,000 examples):" if is_full else f"200 examples, {steps} steps:")
        parts.append(_trials(folder))
    return paragraphs(*parts)


def parents(results: Path) -> str:
    """What parents specialise in: the run on the test part, and the search for its setting."""
    report = read_result(results / "figure2" / "inspection.json")
    layers = {"trained": report.results[-1], "untrained": report.others["untrained"]["layers"][-1]}
    rows = []
    for name, trial in read_folder(results / "figure2_search").items():
        last, fresh = (trial.results[which][-1] for which in ("trained", "untrained"))
        accuracy = f"{100 * trial.settings['selection_accuracy']:.1f}"
        nmi = [f"{layer['nmi_documents']:.3f}" for layer in (last, fresh)]
        about = [name.rsplit("-", 3)[0], f"{trial.settings['epochs']:g}", str(trial.seed), accuracy]
        rows.append([*about, *nmi, str(last["purest"])])
    header = [
        "trial",
        "epochs",
        "seed",
        "accuracy",
        "NMI of documents",
        "untrained",
        "purest parent of a tenth or more",
    ]
    return paragraphs(
        table(
            ["BBC News, test part, last layer", "NMI of documents", "NMI of positions", "purest parent"],
            [[name, *_specialisation(layer)] for name, layer in layers.items()],
        ),
        "![The paper's Figure 2](figure2.svg)",
        "The search for its setting, on the validation part, texts cut to 64 tokens. By `python -m "
        "sparsepeft_research.experiments.figure2_search --data-dir DATA`.",
        table(header, rows),
    )


def _is_score(title: str) -> bool:
    return title.startswith("mean of") or (title.islower() and not set(title) & set(" /"))


def _spartan_scores(folder: Path) -> dict[tuple[str, int | None], float]:
    runs = read_folder(folder, "*-spartan-*.json").values()
    return {(run.settings["task"], run.seed): 100 * run.settings["score"] for run in runs}


def _trials(folder: Path) -> str:
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for name, run in read_folder(folder).items():
        method, task = run.settings["method"], run.settings["task"]
        trial = name.removeprefix(f"{method}-").removesuffix(f"-{task}-{run.seed}")
        scores.setdefault((method, trial), {}).setdefault(task, []).append(100 * run.settings["score"])
    tasks = sorted({task for by_task in scores.values() for task in by_task})
    rows = []
    for (method, trial), by_task in scores.items():
        means = {task: statistics.mean(values) for task, values in by_task.items()}
        mean = statistics.mean(means.values()) if len(means) == len(tasks) else None
        shown = [f"{means[task]:.1f}" if task in means else "" for task in tasks]
        rows.append((method, -(mean or 0.0), [method, trial, *shown, "" if mean is None else f"{mean:.1f}"]))
    return table(["method", "trial", *tasks, "mean"], [row for _, _, row in sorted(rows, key=lambda row: row[:2])])


def _specialisation(layer: dict[str, Any]) -> list[str]:
    large = [parent for parent in layer["parents"] if parent["documents"] >= 0.1 * layer["documents"]]
    best = max(large, key=lambda parent: parent["purity"])
    label = max(best["labels_documents"], key=best["labels_documents"].get)
    purest = f"{best['purity']:.0%} {label}, {best['documents']} of {layer['documents']} documents"
    return [f"{layer['nmi_documents']:.3f}", f"{layer['nmi_positions']:.3f}", purest]
