"""What figures share: colours, and saying how to install what draws them."""

from __future__ import annotations

from typing import Any

from sparsepeft.errors import UserError

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
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            'Figures need matplotlib, which is not installed; run pip install "sparsepeft[plots]".'
        ) from error
