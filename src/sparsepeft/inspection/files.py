"""Writing an inspection into a folder."""

from __future__ import annotations

from pathlib import Path

from sparsepeft.folders import check_output
from sparsepeft.inspection.figures import label_figure, nmi_figure, picks_figure, save_figure
from sparsepeft.inspection.page import render_page
from sparsepeft.inspection.report import MemoryReport
from sparsepeft.provenance import environment, write_bytes, write_json
from sparsepeft.runs.files import RUN

REPORT, PAGE = "inspection.json", "inspection.html"


def check_folder(folder: Path, *also: str) -> None:
    """See that an inspection may be written to ``folder``: a new one, an empty one, a run's, or one of an inspection.

    Args:
        folder: for the output.
        *also: further names by which it may be known.

    Raises:
        UserError: it holds other files, or is a file.
        RunFailed: it cannot be written to.
    """
    check_output(folder, (REPORT, RUN, *also), "an inspection", overwrite=True)


def write_inspection(report: MemoryReport, folder: Path, title: str = "What the parent cells have learned") -> None:
    """Write the numbers as JSON, the page, and every figure as PNG and SVG.

    Args:
        report: what was found.
        folder: made if it is not there; gets ``inspection.json``, ``inspection.html``, ``nmi`` and, for each layer by
            its place among the memories, ``layer-N-labels`` and ``layer-N-picks``.
        title: heading of the page.

    Raises:
        UserError: matplotlib is not installed.
    """
    page = render_page(report, title)
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
