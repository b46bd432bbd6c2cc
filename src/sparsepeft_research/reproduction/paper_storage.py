"""The SPARTAN paper's storage figures, and how they differ from what is counted."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    PreTrainedConfig,
)

from sparsepeft.storage.counting import ROBERTA_BASE_SIZES, ParameterCounter, Sizes

# The paper's appendix A: its sizes, and what its totals in appendix E are for.
_PAPER_TASKS, _PAPER_REDUCTION, _PAPER_PARENTS, _PAPER_CHILDREN = 9, 12, 16, 3
_PAPER_SOURCE = "arXiv:2211.16634, appendix E; ratio from table 1"


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


def paper_notes(counter: ParameterCounter, backbone: int, num_tasks: int) -> tuple[str, ...]:
    """One sentence for each difference between the paper's figures and this report's."""
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
