"""What a batch's labels mean: classes of documents, of positions, quantile bins of a value, or nothing usable."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from sparsepeft.errors import UserError

NUM_BINS = 5
_NO_LABELS = "There are no labels, so everything that needs them is left out."
_SEVERAL = "A text with several labels is counted once for each; purity is the share of texts that have a label."


def quantile_edges(values: Sequence[float], num_bins: int = NUM_BINS) -> list[float]:
    """Inner borders of bins that hold about equally many of ``values``; fewer bins where values repeat."""
    inner = np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, num_bins + 1)[1:-1])
    return [float(edge) for edge in np.unique(inner) if edge < max(values)]


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names of the bins between ``edges``; a value on an edge belongs to the lower bin."""
    if not edges:
        return ("all values",)
    inner = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
    return (f"up to {edges[0]:.4g}", *inner, f"above {edges[-1]:.4g}")


class BatchLabels:
    """Reads classes out of batches.

    Args:
        names: the labels, by class index.
        edges: borders of the bins of a value; the names are then made from them.
        per_position: whether integer labels (B, T) are classes of positions; else they are taken for next tokens.
    """

    def __init__(self, names: Sequence[str], edges: Sequence[float] | None, per_position: bool) -> None:
        self.names = tuple(names) if edges is None else bin_names(edges)
        self.unit: str | None = None
        self.note: str | None = _NO_LABELS
        self._edges, self._per_position = edges, per_position

    def read(self, labels: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The classes of a batch; sets ``unit`` to what they belong to, or ``note`` to why there are none.

        Args:
            labels: the batch's labels, (B,), (B, 1), (B, T), or where documents have several ones and zeros as floats,
                (B, L); or None.

        Returns:
            Classes of documents, (B,), or ones and zeros, (B, L); empty if they have none. Classes of positions,
            (B, T), None if they have none of their own. Negative: this one has no label.

        Raises:
            UserError: a class has no name, or values came without edges.
        """
        nothing = np.zeros(0, dtype=np.int64)
        if labels is None:
            return nothing, None
        values = labels.detach().cpu().numpy()
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        is_value = self._edges is not None or not np.issubdtype(values.dtype, np.integer)
        if values.ndim == 1:
            self.unit, self.note = "documents", None
            return self._binned(values) if is_value else self._checked(values), None
        is_one_or_zero = self._edges is None and is_value and np.isin(values, (0, 1)).all()
        if is_one_or_zero and values.ndim == 2 and values.shape[1] == len(self.names):
            self.unit, self.note = "documents", _SEVERAL
            return values.astype(np.int64), None
        if values.ndim == 2 and not is_value and self._per_position:
            self.unit = "positions"
            self.note = "Labels belong to positions, so documents have none: purity and their information are left out."
            return nothing, self._checked(values)
        self.note = (
            f"Labels of shape {values.shape} are next tokens, not classes, so everything that needs labels is left "
            "out; for classes of positions, pass label_names."
        )
        return nothing, None

    def _binned(self, values: np.ndarray) -> np.ndarray:
        if self._edges is None:
            raise UserError(
                "The labels are numbers with fractions, which must be put into bins; pass "
                "`label_edges=quantile_edges(all_labels)`."
            )
        bins = np.digitize(values, self._edges, right=True)
        return np.where(np.isfinite(values), bins, -1)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if values.size and values.max() >= len(self.names):
            raise UserError(
                f"Label {values.max()} occurs, but there are {len(self.names)} label names; pass a name for each of 0 "
                f"to {values.max()} in `label_names`."
            )
        return values.astype(np.int64)
