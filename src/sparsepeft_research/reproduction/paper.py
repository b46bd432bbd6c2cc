"""Tables 1 to 3 of the SPARTAN paper (arXiv:2211.16634), as printed: RoBERTa-base, mean of three seeds."""

from __future__ import annotations

from dataclasses import dataclass

from sparsepeft_research.reproduction.paper_storage import paper_figures

SOURCE = "arXiv:2211.16634"
TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")  # in the order of the columns
METHODS = ("full", "pfeiffer", "houlsby", "spartan")
MISMATCHED = "mnli-mm"

_COLUMNS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", MISMATCHED, "qnli", "rte", "wnli")
_FULL_DATA = {  # table 1
    "full": (60.5, 94.3, 88.2, 91.3, 90.7, 87.5, 87.3, 92.4, 75.3, 47.9),
    "pfeiffer": (59.7, 94.2, 88.0, 89.5, 90.3, 86.8, 86.9, 92.4, 76.8, 50.7),
    "houlsby": (59.1, 94.3, 86.9, 89.9, 90.5, 87.1, 87.2, 92.6, 76.8, 51.6),
    "spartan": (60.5, 94.4, 89.2, 89.6, 90.3, 86.5, 86.5, 91.9, 75.0, 52.1),
}
_FEW_SHOT = {  # table 3
    "full": (34.6, 87.3, 77.7, 71.8, 74.4, 57.7, 61.1, 77.8, 53.9, 34.7),
    "pfeiffer": (39.7, 87.5, 78.6, 74.3, 79.8, 54.4, 58.2, 76.1, 52.6, 39.9),
    "houlsby": (37.7, 87.1, 77.9, 75.1, 75.1, 55.2, 59.1, 75.8, 51.0, 38.0),
    "spartan": (38.3, 87.6, 78.7, 71.8, 79.0, 52.1, 55.8, 75.4, 49.7, 42.3),
}
_AVERAGES = {  # tables 1 and 3 (table 2 prints the latter again)
    "full-data": {"full": 80.9, "pfeiffer": 80.9, "houlsby": 81.0, "spartan": 81.1},
    "few-shot": {"full": 63.3, "pfeiffer": 64.8, "houlsby": 63.7, "spartan": 63.9},
}
# Instances per minute at inference, table 1: Raspberry Pi 4, iPhone 11.
_DEVICES = {"full": (207.6, 366.2), "pfeiffer": (20.0, 216.1), "houlsby": (19.5, 204.8), "spartan": (201.3, 332.6)}
# Fine-tuning throughput of table 2, whose unit the paper does not name. Table 3 prints 21.3, 55.3, 59.8 and 36.1 for
# the same, with the order turned round, as seconds per batch would.
_FINE_TUNING = {"full": 90.1, "pfeiffer": 32.1, "houlsby": 34.7, "spartan": 53.3}


@dataclass(frozen=True)
class PaperRow:
    """One method's row.

    Attributes:
        method: by our name; ``"full"`` is the paper's RoBERTa.
        storage: of nine tasks over one backbone, as printed.
        average: over the nine tasks, with MNLI matched, as printed.
        scores: per task, x 100; MRPC is an accuracy; ``"mnli-mm"`` is MNLI mismatched.
        raspberry_pi, iphone: instances per minute at inference (table 1).
        fine_tuning: throughput of few-shot training, larger is faster, unit not named (table 2).
    """

    method: str
    storage: str
    average: float
    scores: dict[str, float]
    raspberry_pi: float | None = None
    iphone: float | None = None
    fine_tuning: float | None = None


def paper_rows(protocol: str) -> dict[str, PaperRow]:
    """What the paper prints for ``"full-data"`` (table 1) or ``"few-shot"`` (tables 2 and 3), by method."""
    storage = {figure.method: figure.ratio_text for figure in paper_figures()}
    rows = {}
    for method, values in (_FULL_DATA if protocol == "full-data" else _FEW_SHOT).items():
        speed: dict[str, float] = {"fine_tuning": _FINE_TUNING[method]}
        if protocol == "full-data":
            speed = dict(zip(("raspberry_pi", "iphone"), _DEVICES[method], strict=True))
        scores = dict(zip(_COLUMNS, values, strict=True))
        rows[method] = PaperRow(method, storage[method], _AVERAGES[protocol][method], scores, **speed)
    return rows
