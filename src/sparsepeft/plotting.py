"""What figures share: colours, and saying how to install what draws them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.errors import UserError
from sparsepeft.extras import require
from sparsepeft.folders import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind; yellow last, since lines and points in it are hard to see.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# For matplotlib.rc_context, whose type is the set of its keys.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "sparsepeft", "font.family": "sans-serif", "font.size": 9}


def require_matplotlib() -> None:
    """Find out before long work whether figures can be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    require("matplotlib", "plots", "A figure")


def write_drawing(draw: Callable[[], Figure], path: Path) -> list[Path]:
    """Write what ``draw`` draws as PNG and SVG, in the package's style.

    Args:
        draw: makes the figure.
        path: without suffix.

    Returns:
        The files written.

    Raises:
        UserError: matplotlib is not installed.
    """
    return [write_figure(draw, path.with_name(path.name + suffix)) for suffix in (".png", ".svg")]


def write_figure(draw: Callable[[], Figure], path: Path) -> Path:
    """Write what ``draw`` draws in the format of the path's suffix, in the package's style.

    Returns:
        The path.

    Raises:
        UserError: matplotlib is not installed, or cannot write the format.
    """
    require_matplotlib()
    import matplotlib

    format = path.suffix[1:].lower()
    options: dict[str, Any] = {"metadata": {"Date": None}} if format == "svg" else {"dpi": 200}
    with matplotlib.rc_context(STYLE):
        figure, drawn = draw(), io.BytesIO()
        if format not in figure.canvas.get_supported_filetypes():
            raise UserError(f"{path} has no suffix of a figure's format; let the name end in .png or .svg.")
        figure.savefig(drawn, format=format, **options)
    write_bytes(path, drawn.getvalue())
    return path
