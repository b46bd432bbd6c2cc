"""What the SPARTAN paper prints (arXiv:2211.16634): its tables 1 to 3 and its storage, on RoBERTa-base."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from sparsepeft.backbones import resolve_model
from sparsepeft.storage.counting import ROBERTA_BASE_SIZES, ParameterCounter, Sizes, load_config

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


# The paper's appendix A: its sizes, and what its totals in appendix E are for.
_PAPER_TASKS, _PAPER_REDUCTION, _PAPER_PARENTS, _PAPER_CHILDREN = 9, 12, 16, 3
_PAPER_SOURCE = "arXiv:2211.16634, appendix E; ratio from table 1"


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


@dataclass(frozen=True)
class PaperFigure:
    """What the SPARTAN paper prints for one method: RoBERTa-base, nine tasks, its own sizes, heads left out.

    Attributes:
        formula: appendix E's for SPARTAN; for the others the one that its totals fit.
        parameters_per_task: the value of the formula's part for one task.
        total_parameters, total_bytes, ratio_text: as printed.
    """

    method: str
    formula: str
    parameters_per_task: int
    total_parameters: int
    total_bytes: int
    ratio_text: str
    source: str = _PAPER_SOURCE


def is_roberta_base(config: PreTrainedConfig) -> bool:
    """Whether a config has the sizes of the paper's backbone."""
    sizes = all(getattr(config, name, None) == value for name, value in ROBERTA_BASE_SIZES.items())
    return config.model_type == "roberta" and sizes


def paper_figures() -> tuple[PaperFigure, ...]:
    """What the paper prints, method by method."""
    d, num_layers = ROBERTA_BASE_SIZES["hidden_size"], ROBERTA_BASE_SIZES["num_hidden_layers"]
    spartan = 2 * (_PAPER_PARENTS + _PAPER_PARENTS * _PAPER_CHILDREN) * d * num_layers
    pfeiffer = 2 * d * (d // _PAPER_REDUCTION) * num_layers
    return (
        PaperFigure("full", "T N", 123_000_000, 1_107_000_000, 4_430_000_000, "9x"),
        PaperFigure("houlsby", "N + 4T d(d/r)L", 2 * pfeiffer, 144_230_000, 580_000_000, "1.2x"),
        PaperFigure("pfeiffer", "N + 2T d(d/r)L", pfeiffer, 133_620_000, 530_000_000, "1.1x"),
        PaperFigure("spartan", "N + 2T(P+PC)dL", spartan, 133_620_000, 530_000_000, "1.1x"),
    )


def paper_storage(
    model: str, num_tasks: int, backbone: int, sizes: Sizes
) -> tuple[tuple[PaperFigure, ...], tuple[str, ...]]:
    """The paper's figures beside a storage report, and a sentence for each difference from it.

    Args:
        model: the report's backbone; unless it has RoBERTa-base's sizes there is nothing to compare.
        num_tasks: the report's.
        backbone: parameters of the backbone, as counted.
        sizes: of the report's adapters.
    """
    config = load_config(resolve_model(model))
    if not is_roberta_base(config):
        return (), ()
    return paper_figures(), _storage_notes(ParameterCounter(config, sizes), backbone, num_tasks)


def _storage_notes(counter: ParameterCounter, backbone: int, num_tasks: int) -> tuple[str, ...]:
    paper = {figure.method: figure for figure in paper_figures()}
    sizes = Sizes(_PAPER_REDUCTION, counter.sizes.lora_rank, _PAPER_PARENTS, _PAPER_CHILDREN, "model")
    at_paper_sizes = ParameterCounter(counter.config, sizes)
    spartan, pfeiffer = at_paper_sizes.own("spartan").parameters, at_paper_sizes.own("pfeiffer").parameters
    per_task = paper["spartan"].parameters_per_task
    head, linear = counter.head_parameters("model", 2), counter.head_parameters("linear", 2)
    pooler = counter.config.hidden_size * (counter.config.hidden_size + 1)
    notes = [
        f"Appendix E's formula 2T(P+PC)dL gives parents a value beside their key, {per_task:,} parameters per task, "
        "but a parent of the paper's section 3 (and of this package) is one vector, so a memory has P(1+2C)dL = "
        f"{spartan:,}.",
        f"The paper's totals fit a backbone of N = 123.00 M (1107 M / 9, and 133.62 M less nine times {per_task:,}), "
        f"which none of RoBERTa-base's counts gives: it has {backbone / 1e6:.2f} M parameters without its pooler, as a "
        f"classifier uses it and as counted here, and {(backbone + pooler) / 1e6:.2f} M with it.",
        f"The paper's totals leave task heads out: RoBERTa's own head has {head:,} parameters per task with two "
        f"labels, a linear head {linear:,}.",
        "The paper prints the formula for SPARTAN alone; its adapter totals fit weights without biases, "
        f"{paper['pfeiffer'].parameters_per_task:,} per task for Pfeiffer, to which the biases of a real adapter add "
        f"{pfeiffer - paper['pfeiffer'].parameters_per_task:,}.",
        'The paper\'s "exactly the same number of trainable parameters as Pfeiffer" follows from these two counts: as '
        "they "
        f"are built, SPARTAN has {spartan:,} and Pfeiffer {pfeiffer:,}.",
        "The paper's sizes are float32 and its GB are 10^9 bytes; its 11 % of RoBERTa's storage (few-shot section) is "
        "12.1 % by its own totals.",
    ]
    current = (num_tasks, counter.sizes.reduction_factor, counter.sizes.num_parents, counter.sizes.num_children)
    if current != (_PAPER_TASKS, _PAPER_REDUCTION, _PAPER_PARENTS, _PAPER_CHILDREN):
        notes.append(
            f"The paper's figures are for {_PAPER_TASKS} tasks, reduction factor {_PAPER_REDUCTION}, {_PAPER_PARENTS} "
            f"parents and {_PAPER_CHILDREN} children, this report for {current[0]}, {current[1]}, {current[2]} and "
            f"{current[3]}: do not compare the two."
        )
    return tuple(notes)
