"""A table as text for people (Markdown, terminal) and for programs (CSV), as a figure, and as files."""

from __future__ import annotations

import csv
import io
import logging
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import UserError
from sparsepeft.folders import write_bytes
from sparsepeft.plotting import COLOURS, MARKERS, require_matplotlib, write_drawing
from sparsepeft_research.benchmarks.devices import DEVICES
from sparsepeft_research.markdown import table as markdown_table
from sparsepeft_research.reproduction import paper
from sparsepeft_research.reproduction.paper import MISMATCHED, PaperRow
from sparsepeft_research.reproduction.tables import MRPC_ACCURACY, Row, Score, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

NOT_MEASURED = "not measured"


def columns(table: Table) -> list[str]:
    """Score columns: the tasks, with what belongs to them; none in table 2, which has only the average."""
    shown = []
    for task in table.tasks if table.name != "table2" else ():
        shown.append(task)
        if task == "mnli" and any(MISMATCHED in row.scores for row in table.rows):
            shown.append(MISMATCHED)
        if task == "mrpc" and table.paper:
            shown.append(MRPC_ACCURACY)
    return shown


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; below a method's row, the paper's, where the backbone is the paper's."""
    counts = [score.n for row in table.rows for score in row.scores.values()]
    usual = max(counts, default=0)
    devices = DEVICES if table.name == "table1" else {}
    as_paper = ["mean, MRPC accuracy"] if table.paper and "mrpc" in table.common_tasks else []
    header = [
        *("method", "storage", *(device.title for device in devices.values()), "steps/minute"),
        *(f"mean of {len(table.common_tasks)}", *as_paper, *columns(table)),
        *("trained parameters", "bytes per task"),
    ]
    rows = []
    for row in table.rows:
        rates = [table.devices.get(device, {}).get(row.method) for device in devices]
        rows.append(
            [
                row.method,
                f"{row.storage:.2f}x" if row.storage is not None else "",
                *(NOT_MEASURED if rate is None else f"{rate:.1f}" for rate in rates),
                f"{row.steps_per_minute:.0f}" if row.steps_per_minute is not None else "",
                _text(row.average, usual),
                *(_text(row.average_as_paper, usual) for _ in as_paper),
                *(_text(row.scores.get(column), usual) for column in columns(table)),
                _range(row.parameters),
                _range(row.saved_bytes),
            ]
        )
        if row.method in table.paper:
            rows.append(_paper_cells(table, table.paper[row.method], bool(as_paper)))
    return header, rows


def paper_average(table: Table, row: PaperRow) -> float | None:
    """The paper's average over the tasks averaged here; None if it does not have them all."""
    if set(table.common_tasks) == set(paper.TASKS):
        return row.average
    if not table.common_tasks or not set(table.common_tasks) <= set(paper.TASKS):
        return None
    return statistics.mean(row.scores[task] for task in table.common_tasks)


def to_markdown(table: Table) -> str:
    """The table with its notes."""
    header, rows = cells(table)
    lines = [f"# {table.title}", "", f"Backbone: {table.model}. Scores x 100.", "", markdown_table(header, rows)]
    if table.chosen:
        names = list(dict.fromkeys(name for values in table.chosen.values() for name in values))
        chosen = [[pair, *(str(values[name]) for name in names)] for pair, values in table.chosen.items()]
        lines += ["", "Chosen by the grid search:", "", markdown_table(["task and method", *names], chosen)]
    lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """One row per method (and one for the paper's), numbers alone, every task."""
    names = list(dict.fromkeys(column for row in table.rows for column in row.scores))
    records = []
    for row in table.rows:
        records.append(_record(table, row))
        if row.method in table.paper:
            records.append(_paper_record(table, table.paper[row.method], names))
    fields = ["source", "method", "storage", "raspberry_pi", "iphone", "steps_per_minute", "fine_tuning_throughput"]
    for name in ("average", "average_as_paper", *names):
        fields += [name, f"{name}_std", f"{name}_n"]
    fields += [f"{kind}_{task}" for kind in ("parameters", "bytes") for task in table.tasks]
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def score_figure(table: Table) -> Figure:
    """Mean score against bytes written per task, a point for each method, with its standard deviation over seeds.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(table.rows):
        if row.average is None:
            continue
        size = statistics.mean(row.saved_bytes[task] for task in table.common_tasks)
        axes.errorbar(
            size,
            row.average.mean,
            yerr=row.average.std,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=8,
            capsize=3,
        )
        axes.annotate(row.method, (size, row.average.mean), xytext=(8, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("bytes written per task (mean, logarithmic)")
    axes.set_ylabel(f"mean score of {len(table.common_tasks)} tasks x 100")
    axes.set_title(f"{table.title.partition(':')[0]}, {table.model}", loc="left", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write ``table2.md``, ``table2.csv``, ``table2.png`` and ``table2.svg``; without matplotlib, the first two.

    Returns:
        The files written.
    """
    written = []
    for suffix, text in ((".md", to_markdown(table)), (".csv", to_csv(table))):
        path = folder / f"{table.name}{suffix}"
        write_bytes(path, text.encode())
        written.append(path)
    try:
        written += write_drawing(lambda: score_figure(table), folder / table.name)
    except UserError as error:
        logger.warning("%s", error)
    return written


def _text(score: Score | None, usual: int) -> str:
    if score is None:
        return ""
    spread = f" ± {score.std:.1f}" if score.std is not None else ""
    return f"{score.mean:.1f}{spread}" + (f" (n={score.n})" if score.n != usual else "")


def _range(values: dict[str, int]) -> str:
    """Tasks differ by their heads alone, so that two numbers say it all."""
    low, high = min(values.values()), max(values.values())
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _paper_cells(table: Table, row: PaperRow, as_paper: bool) -> list[str]:
    average = paper_average(table, row)
    shown = f"{average:.1f}" if average is not None else ""
    # With MRPC, the paper's average stands under the one that is computed like it.
    averages = ["", shown] if as_paper else [shown]
    speeds = [f"{value:.1f}" for value in (row.raspberry_pi, row.iphone) if value is not None]
    return [
        *(f"{row.method}, paper", row.storage, *speeds),
        f"{row.fine_tuning:.1f}" if row.fine_tuning is not None else "",
        *averages,
        *(f"{score:.1f}" if (score := _paper_score(row, column)) is not None else "" for column in columns(table)),
        *("", ""),
    ]


def _paper_score(row: PaperRow, column: str) -> float | None:
    if column == "mrpc":
        return None  # a mean of accuracy and F1, which the paper does not print
    return row.scores.get("mrpc" if column == MRPC_ACCURACY else column)


def _record(table: Table, row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"source": "measured", "method": row.method}
    for field, device in (("raspberry_pi", "raspberry-pi-4"), ("iphone", "iphone-11")):
        record[field] = _round(table.devices.get(device, {}).get(row.method))
    record |= {"storage": _round(row.storage), "steps_per_minute": _round(row.steps_per_minute)}
    scores = {"average": row.average, "average_as_paper": row.average_as_paper, **row.scores}
    for name, score in scores.items():
        if score is not None:
            record |= {name: _round(score.mean), f"{name}_std": _round(score.std), f"{name}_n": score.n}
    record |= {f"parameters_{task}": count for task, count in row.parameters.items()}
    return record | {f"bytes_{task}": count for task, count in row.saved_bytes.items()}


def _paper_record(table: Table, row: PaperRow, names: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"source": paper.SOURCE, "method": row.method, "storage": row.storage.removesuffix("x")}
    record |= {"raspberry_pi": row.raspberry_pi, "iphone": row.iphone, "fine_tuning_throughput": row.fine_tuning}
    record["average_as_paper"] = _round(paper_average(table, row))
    return record | {name: _paper_score(row, name) for name in names}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
