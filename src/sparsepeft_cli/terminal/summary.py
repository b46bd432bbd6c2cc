"""What is printed when a run is done, or before it is begun: lines for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsepeft.reprs import duration, megabytes
from sparsepeft_cli.terminal.errors import in_options

_MOST_CLASSES = 12  # with a line each
_WORST_CLASSES = 5  # of more
_WIDEST = 24  # characters of a label's name
_PARTS = {"training": "to train on", "selection": "to choose the checkpoint"}


def print_summary(results: Mapping[str, Any], folder: str) -> None:
    """Print what came out of a run, and what to do next."""
    from sparsepeft_cli.terminal.console import out

    is_text = results["task"] == "lm"
    if is_text and results["spt"]:
        for part in report_parts(results["spt"], "before fine-tuning"):
            out.print(part, highlight=False, soft_wrap=True)
    first, *rest = text_summary(results, folder) if is_text else summary(results, folder)
    out.print(first, style="bold", highlight=False, soft_wrap=True)
    for line in rest:
        out.print(line, highlight=False, soft_wrap=True)


def summary(results: Mapping[str, Any], folder: str) -> list[str]:
    """The lines on labelled texts; only the last, a command to copy, may be longer than 80 characters."""
    part, main = results["score_split"], results["main_metric"]
    rows = results["num_rows"]
    scores = results["metrics"][part]
    others = [f"{name} {value:.4f}" for name, value in scores.items() if name != main]
    lines = [f"{results['task']}, {results['method']}: {main} {results['score']:.4f} on {part} ({rows[part]:,} rows)"]
    lines += [f"  {line}" for line in _wrapped([*others, *_errors(results)], ", ", 78)]
    lines.append("  " + _baseline(results["baseline"], main))
    lines += [f"  {line}" for line in (*_at_half(results), *_by_infer(results))]
    if "spt" in results:
        lines.append(sparse_line(results["spt"]["config"], results["spt"]["report"]))
    lines += _wrapped([f"rows: {rows['training']:,} to train on", *_counts(rows)], ", ", 80)
    best = f"; the best checkpoint: step {results['best_step']:,}" if results["best_step"] else ""
    lines.append(f"{results['steps']:,} steps in {duration(results['train_seconds'])}{best}")
    lines += _classes(results["report"].get("per_class"))
    lines += _size(results)
    return [*lines, *_notes(results["notes"]), _next(results, folder)]


def text_summary(results: Mapping[str, Any], folder: str) -> list[str]:
    """The same on a language model."""
    from sparsepeft_cli.terminal.console import program

    first = f" that begin with {results['bos_token']}" if results["bos_token"] else ""
    before = ", ".join(f"{kind} {values['perplexity']:.2f}" for kind, values in results["before"].items())
    parameters = results["parameters"]
    routers = f", of them {parameters['routers']:,} in the routers" if parameters["routers"] else ""
    return [
        f"lm, {results['method']}: perplexity {results['score']:.2f} on {results['num_validation_tokens']:,} held-out "
        f"tokens (before: {before})",
        *_by_infer(results),
        f"{results['num_train_tokens']:,} training tokens in blocks of {results['block_length']}{first}",
        f"{results['steps']:,} steps in {duration(results['train_seconds'])}",
        f"trained: {parameters['trained']:,} parameters{routers}",
        f"saved: {megabytes(results['saved_bytes'])}; a copy of the model would be {megabytes(results['model_bytes'])}",
        *_notes(results["notes"]),
        f'next: {program()} generate {folder} "some text"',
    ]


def report_parts(spt: Mapping[str, Any], title: str) -> list[Any]:
    """What a conversion changed, for the screen: a table of the layers, and what they became."""
    from sparsepeft.spt import Plan
    from sparsepeft_cli.terminal.console import table

    report = spt["report"]
    columns = {
        "recall": report["recall"],
        "attention error": report["attention_error"],
        "FFN error": report["feed_forward_error"],
    }
    shown = {name: values for name, values in columns.items() if values}
    layers: dict[str, dict[str, float]] = {}
    for column, values in shown.items():
        for name, value in values.items():
            layers.setdefault(_layer(name), {})[column] = value
    rows = [
        [layer, *(f"{values[column]:.3f}" if column in values else "" for column in shown)]
        for layer, values in layers.items()
    ]
    became = sparse_line(spt["config"], report) if spt["plan"] is None else str(Plan.from_dict(spt["plan"]))
    return [*([table(title, ["layer", *shown], rows)] if rows else []), became]


def sparse_line(config: dict[str, Any], report: dict[str, Any]) -> str:
    """What became sparse, and how far."""
    parts = []
    if config["attention"]:
        parts.append(f"attention: {config['top_l']} keys for each query, by {config['granularity']}")
    if config["ffn"]:
        parts.append(f"FFN: {config['num_active_blocks']} of {config['num_blocks']} blocks for each token")
        if report["feed_forward_operations"] is not None:
            parts[-1] += f", {report['feed_forward_operations']:.1%} of the multiply-adds"
        if report.get("feed_forward_step_operations") is not None:
            parts[-1] += f", {report['feed_forward_step_operations']:.1%} of those of a training step"
    return "\n".join(parts)


def _layer(name: str) -> str:
    """A layer's name from that of a part of it: up to its number."""
    words = name.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[-1] + 1]) if numbers else name


def print_plan(measured: Mapping[str, Any]) -> None:
    """Print what a dry run has measured."""
    from sparsepeft_cli.terminal.console import out

    plan = measured["plan"]
    sizes = plan["sizes"]
    lines = [
        f"{plan['task']}, {plan['method']} on {plan['model']}, {plan['device']}, {plan['precision']}",
        *_wrapped([f"rows: {sizes['training']:,} to train on", *_counts(sizes)], ", ", 80),
        f"{plan['steps']:,} steps of {plan['batch_size']} examples, {plan['epochs']:.3g} epochs",
        f"trained: {measured['trained_parameters']:,} parameters; saved: {megabytes(measured['saved_bytes'])}",
        f"about {duration(measured['estimated_seconds'])}, at {measured['seconds_per_step']:.2g} s a step here and now",
    ]
    lines += _notes(plan["notes"])
    for line in [*lines, f"Nothing was written to {plan['folder']}."]:
        out.print(line, highlight=False, soft_wrap=True)


def _notes(notes: Iterable[str]) -> list[str]:
    return [line for note in notes for line in _wrapped(f"note: {in_options(note)}".split(), " ", 80)]


def _counts(rows: Mapping[str, int]) -> list[str]:
    return [f"{count:,} {_PARTS.get(name, name)}" for name, count in rows.items() if name != "training"]


def _by_infer(results: Mapping[str, Any]) -> list[str]:
    """What a sparse model scores as it is, and as the dense model that it was made from."""
    part, main = results["score_split"], results["main_metric"]
    scores = results.get("metrics_by_infer", {})
    said = ", ".join(f"{infer} {metrics[part][main]:.4f}" for infer, metrics in scores.items())
    return [f"{main} by how the model answers: {said}"] if said else []


def _at_half(results: Mapping[str, Any]) -> list[str]:
    """What several labels would score without thresholds of their own."""
    scores = results.get("metrics_at_half", {}).get(results["score_split"], {})
    said = [f"{name} {value:.4f}" for name, value in scores.items()]
    return _wrapped([f"with 0.5 as every label's threshold: {said[0]}", *said[1:]], ", ", 78) if said else []


def _errors(results: Mapping[str, Any]) -> list[str]:
    """Mean absolute error of a regression whose metrics do not have it."""
    report = results["report"]
    is_new = "mae" in report and "mae" not in results["metrics"][results["score_split"]]
    return [f"mae {report['mae']:.4f}"] if is_new else []


def _baseline(baseline: Mapping[str, Any], main: str) -> str:
    answer, metrics = baseline["answer"], baseline["metrics"]
    if isinstance(answer, float):
        return f"the mean of the training labels, {answer:.4g}, for all: mae {metrics['mae']:.4f}"
    if isinstance(answer, list):
        return f"the most frequent of the labels, {_short(', '.join(answer))}, for all: {main} {metrics[main]:.4f}"
    return f"the most frequent label, {_short(answer)}, for all: {main} {metrics[main]:.4f}"


def _classes(per_class: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    """A line for each class; of many for those with the lowest F1, among those that any row has."""
    if not per_class:
        return []
    shown = list(per_class.items())
    if len(shown) > _MOST_CLASSES:
        present = [one for one in shown if one[1]["support"]]
        shown = sorted(present, key=lambda one: one[1]["f1"])[:_WORST_CLASSES]
    width = max(len("label"), *(len(_short(name)) for name, _ in shown))
    head = f"{'label':<{width}}  precision  recall      f1  support"
    lines = (
        f"{_short(name):<{width}}  {v['precision']:>9.3f}  {v['recall']:>6.3f}  {v['f1']:>6.3f}  {v['support']:>7,}"
        for name, v in shown
    )
    rest = [f"(the {len(shown)} labels with the lowest f1, of {len(per_class)})"] if len(shown) < len(per_class) else []
    return [head, *lines, *rest]


def _size(results: Mapping[str, Any]) -> list[str]:
    parameters, saved = results["parameters"], megabytes(results["saved_bytes"])
    if results["method"] == "full":
        return [f"trained: all {parameters['trained']:,} parameters; saved: {saved}, a copy of the model"]
    parts = [f"{parameters['head']:,} in the head"]
    if parameters.get("routers"):
        parts.append(f"{parameters['routers']:,} in the routers")
    return [
        f"trained: {parameters['trained']:,} parameters, of them {' and '.join(parts)}",
        f"saved: {saved}; a copy of the model would be {megabytes(results['model_bytes'])}",
    ]


def _next(results: Mapping[str, Any], folder: str) -> str:
    from sparsepeft_cli.terminal.console import program

    texts = '"one text" "another text"' if results["num_texts"] == 2 else '"some text"'
    answer = {"regression": "  # gives a value", "multi_label_classification": "  # gives all labels that hold"}
    return f"next: {program()} predict {folder} {texts}{answer.get(results['problem_type'], '')}"


def _short(name: str) -> str:
    return name if len(name) <= _WIDEST else name[: _WIDEST - 1] + "…"


def _wrapped(parts: Iterable[str], separator: str, width: int) -> list[str]:
    """The parts in lines, none of which is broken inside a part."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines
