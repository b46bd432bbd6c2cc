"""Writing an inspection into a folder: numbers, figures, and a page that needs no network, scripts or other files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sparsepeft.folders import check_output, locked, write_bytes, write_json
from sparsepeft.inspection.figures import inline_svg, label_figure, most_used, nmi_figure, picks_figure, save_figure
from sparsepeft.inspection.report import LayerReport, MemoryReport
from sparsepeft.provenance import environment
from sparsepeft.runs.files import RUN

_NMI = "Lines of the normalised mutual information by layer; of documents"
REPORT, PAGE = "inspection.json", "inspection.html"


def render_page(report: MemoryReport, title: str = "What the parent cells have learned") -> str:
    """The page; names of labels and words of the texts are escaped.

    Raises:
        UserError: matplotlib is not installed.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "percent": _percent}
    source = resources.files("sparsepeft.inspection").joinpath("page.html").read_text(encoding="utf-8")
    values = ", ".join(f"{layer.name} {_number(layer.nmi_documents)}" for layer in report.layers)
    has_nmi = any(layer.nmi_positions is not None for layer in report.layers)
    return environment.from_string(source).render(
        report=report,
        title=title,
        has_labels=report.label_names is not None,
        # matplotlib has escaped what stands inside its drawings.
        nmi_svg=Markup(inline_svg(nmi_figure(report), f"{_NMI}: {values}", "nmi")) if has_nmi else None,
        figures=[_drawings(number, layer) for number, layer in enumerate(report.layers)],
    )


def _drawings(number: int, layer: LayerReport) -> dict[str, Markup | None]:
    labels = None
    if any(parent.labels_positions for parent in most_used(layer)):
        labels = Markup(inline_svg(label_figure(layer), _describe_labels(layer), f"labels-{number}"))
    shares = ", ".join(f"parent {parent.index} {parent.share_first:.0%}" for parent in most_used(layer))
    described = f"Bars of how often each parent of {layer.name} comes first: {shares}"
    picks = inline_svg(picks_figure(layer), described, f"picks-{number}")
    return {"labels": labels, "picks": Markup(picks)}


def _describe_labels(layer: LayerReport) -> str:
    """The drawing in words; the numbers stand in the table below it."""
    held = [
        f"parent {p.index}: {p.purity:.0%} {p.main_label} of {p.documents} documents"
        for p in most_used(layer)
        if p.purity is not None
    ]
    return f"Bars of the labels that pick each parent of {layer.name}. {'; '.join(held)}"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def check_folder(folder: Path, *also: str) -> None:
    """Check that an inspection may be written to ``folder``: new, empty, a run's, or an earlier inspection's.

    Args:
        *also: further names by which it may be known.

    Raises:
        UserError: it holds other files, or is a file.
        RunFailed: it cannot be written to.
    """
    check_output(folder, (REPORT, RUN, *also), "an inspection", overwrite=True)


def write_inspection(report: MemoryReport, folder: Path, title: str = "What the parent cells have learned") -> None:
    """Write the numbers as JSON, the page, and every figure as PNG and SVG.

    Args:
        folder: made if it is not there; gets ``inspection.json``, ``inspection.html``, ``nmi`` and, for each layer by
            its place among the memories, ``layer-N-labels`` and ``layer-N-picks``.

    Raises:
        UserError: matplotlib is not installed, or another process is writing to the folder.
        RunFailed: it cannot be written to.
    """
    page = render_page(report, title)
    with locked(folder):
        if any(layer.nmi_positions is not None for layer in report.layers):
            save_figure(nmi_figure(report), folder / "nmi")
        for number, layer in enumerate(report.layers):
            twice = sum(other.index == layer.index for other in report.layers) > 1
            stem = f"layer-{layer.index}" + (f"-{number}" if twice else "")
            if any(parent.labels_positions for parent in layer.parents):
                save_figure(label_figure(layer), folder / f"{stem}-labels")
            save_figure(picks_figure(layer), folder / f"{stem}-picks")
        write_bytes(folder / PAGE, page.encode())
        write_json(folder / REPORT, {**report.to_dict(), "environment": environment()})
