"""What a device has to store for many tasks on one backbone, method by method.

Models are built on the meta device: parameters are counted, none is allocated and no weights are read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    RobertaConfig,
)

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.tuners import SpartanConfig
from sparsepeft.tuners._blocks import find_blocks
from sparsepeft.tuners._heads import find_head
from sparsepeft.tuners.config import HEAD_TYPES, dtype_name, require_choice, require_positive

METHODS = ("full", "houlsby", "pfeiffer", "lora", "spartan")
_CLASSES = (AutoModelForSequenceClassification, AutoModelForImageClassification, AutoModelForAudioClassification)

_ROBERTA_BASE_NAMES = ("roberta-base", "FacebookAI/roberta-base")
_ROBERTA_BASE_SIZES = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
# The paper's appendix A: its sizes, and what its totals in appendix E are for.
_PAPER_TASKS, _PAPER_REDUCTION, _PAPER_PARENTS, _PAPER_CHILDREN = 9, 12, 16, 3
_PAPER_SOURCE = "arXiv:2211.16634, appendix E; ratio from table 1"


@dataclass(frozen=True)
class MethodStorage:
    """One method's share of a :class:`StorageReport`.

    Attributes:
        method: one of :data:`METHODS`.
        parameters_per_task: trained for each task, without the head.
        head_type: ``"model"`` (the model's own) or ``"linear"``.
        head_parameters_per_task: the head's, for each task.
        bytes_per_task: what each task adds to the device, head included.
        total_parameters, total_bytes: for all tasks, heads included, the backbone counted once (full fine-tuning: a
            copy per task).
        total_parameters_without_heads: the same without heads, as the paper counts.
        ratio: ``total_bytes`` over one bare backbone's bytes.
        ratio_text: the same for a table, such as ``"1.1x"``.
        formula: the closed formula for ``parameters_per_task``, written out.
        formula_parameters: its value.
        counted: where ``parameters_per_task`` comes from: ``"model"`` or ``"attached adapter"`` (counted on real
            objects), or ``"formula"``.
    """

    method: str
    parameters_per_task: int
    head_type: str
    head_parameters_per_task: tuple[int, ...]
    bytes_per_task: tuple[int, ...]
    total_parameters: int
    total_parameters_without_heads: int
    total_bytes: int
    ratio: float
    ratio_text: str
    formula: str
    formula_parameters: int
    counted: str


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


@dataclass(frozen=True)
class StorageReport:
    """What :func:`storage_report` found; ``paper`` is empty unless the backbone has RoBERTa-base's sizes."""

    model: str
    num_tasks: int
    num_labels: tuple[int, ...]
    dtype: str
    backbone_parameters: int
    backbone_bytes: int
    methods: tuple[MethodStorage, ...]
    paper: tuple[PaperFigure, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Sizes:
    reduction_factor: int
    lora_rank: int
    num_parents: int
    num_children: int
    head_type: str


@dataclass(frozen=True)
class _Own:
    """A method's own parameters for one task."""

    parameters: int
    formula: str
    formula_parameters: int
    counted: str


def storage_report(
    model: str,
    num_tasks: int = 9,
    *,
    num_labels: int | Sequence[int] = 2,
    dtype: str = "float32",
    methods: Sequence[str] | None = None,
    reduction_factor: int = 12,
    lora_rank: int = 8,
    num_parents: int = 16,
    num_children: int = 3,
    head_type: str = "model",
) -> StorageReport:
    """Count what each method stores for ``num_tasks`` tasks. Reads a config, no weights.

    Bytes are parameters times the dtype's width; the few kilobytes of file headers are left out. A head is what
    follows the backbone in the model class; a pooler that a checkpoint lacks (and training would add to the head)
    cannot be told from a config.

    Args:
        model: hub id or local folder, ``"minilm"``, or ``"roberta-base"``, whose sizes are built in.
        num_tasks: tasks on the device.
        num_labels: outputs of every task's head, or one number per task.
        dtype: of the backbone and all that is trained: ``"float32"`` or ``"fp32"``, ``"bfloat16"`` or ``"bf16"``,
            ``"float16"`` or ``"fp16"``.
        methods: which of :data:`METHODS`, in the order of the report; None takes all, but leaves LoRA out (with a
            note) where PEFT has no default modules for the architecture.
        reduction_factor: of Houlsby and Pfeiffer adapters (bottleneck d / r).
        lora_rank: rank of LoRA on PEFT's default modules for the architecture.
        num_parents, num_children: SPARTAN's P and C.
        head_type: of SPARTAN and the adapters; full fine-tuning and LoRA always train the model's own head.

    Raises:
        UserError: an unknown method, an impossible size, or a model whose config cannot be had or attached to.
    """
    num_labels = _check(num_tasks, num_labels, methods)
    notes: tuple[str, ...] = ()
    sizes = _Sizes(reduction_factor, lora_rank, num_parents, num_children, head_type)
    try:
        dtype = dtype_name("dtype", dtype)
        require_choice("head_type", head_type, HEAD_TYPES)
        for name in ("reduction_factor", "lora_rank", "num_parents", "num_children"):
            require_positive(name, getattr(sizes, name))
        resolved = resolve_model(model)
        config = _load_config(resolved)
        if methods is None:
            methods, notes = _supported_methods(config)
        counter = _Counter(config, sizes)
        backbone = counter.backbone_parameters()
        width = getattr(torch, dtype).itemsize
        rows = tuple(_row(counter, method, num_labels, backbone, width) for method in dict.fromkeys(methods))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    is_paper = _is_roberta_base(config)
    return StorageReport(
        model=describe_backbone(resolved),
        num_tasks=num_tasks,
        num_labels=num_labels,
        dtype=dtype,
        backbone_parameters=backbone,
        backbone_bytes=backbone * width,
        methods=rows,
        paper=_paper_figures() if is_paper else (),
        notes=notes + (_paper_notes(counter, backbone, num_tasks) if is_paper else ()),
    )


def _check(num_tasks: int, num_labels: int | Sequence[int], methods: Sequence[str] | None) -> tuple[int, ...]:
    """Check what needs no model; the number of labels of each task."""
    try:
        require_positive("num_tasks", num_tasks)
        labels = (num_labels,) * num_tasks if isinstance(num_labels, int) else tuple(num_labels)
        for count in labels:
            require_positive("num_labels", count)
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(labels) != num_tasks:
        raise UserError(
            f"num_labels has {len(labels)} entries, but there are num_tasks={num_tasks} tasks; give one number for "
            "all, or one per task."
        )
    if methods is None:
        return labels
    if isinstance(methods, str) or not methods:
        raise UserError(f"methods={methods!r} was given, but it must be a list with some of {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            raise UserError(unknown_name("method", str(method), METHODS))
    return labels


def _supported_methods(config: PreTrainedConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All methods that can be counted for an architecture, and a note on what was left out."""
    if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return METHODS, ()
    note = f"LoRA is left out, since PEFT has no default modules for {config.model_type!r} models."
    return tuple(method for method in METHODS if method != "lora"), (note,)


def _row(counter: _Counter, method: str, num_labels: tuple[int, ...], backbone: int, width: int) -> MethodStorage:
    own = counter.own(method)
    head_type = "model" if method in ("full", "lora") else counter.sizes.head_type
    heads = tuple(counter.head_parameters(head_type, count) for count in num_labels)
    without_heads = (0 if method == "full" else backbone) + own.parameters * len(heads)
    total = without_heads + sum(heads)
    ratio = total / backbone
    return MethodStorage(
        method=method,
        parameters_per_task=own.parameters,
        head_type=head_type,
        head_parameters_per_task=heads,
        bytes_per_task=tuple((own.parameters + head) * width for head in heads),
        total_parameters=total,
        total_parameters_without_heads=without_heads,
        total_bytes=total * width,
        ratio=ratio,
        ratio_text=_ratio_text(ratio),
        formula=own.formula,
        formula_parameters=own.formula_parameters,
        counted=own.counted,
    )


def _ratio_text(ratio: float) -> str:
    text = f"{ratio:.1f}"
    return f"{text.removesuffix('.0') if ratio >= 2 else text}x"


# -- counting ---------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts parameters on models of one config, built on the meta device."""

    def __init__(self, config: PreTrainedConfig, sizes: _Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.widths = [block.hidden_size for block in find_blocks(self.build())]
        self._heads: dict[tuple[str, int], int] = {}

    def build(self, num_labels: int = 2) -> nn.Module:
        """The bare model with its own head, without storage."""
        config = copy.deepcopy(self.config)
        config.num_labels = num_labels
        for auto_class in _CLASSES:
            if type(config) in auto_class._model_mapping:
                with torch.device("meta"):
                    built: nn.Module = auto_class.from_config(config)
                return built
        raise UserError(
            f"transformers has no classification model for {config.model_type!r} models, so heads cannot be counted; "
            "choose another model."
        )

    def attach(self, adapter: PeftConfig, num_labels: int = 2) -> nn.Module:
        """The model with an adapter, without storage."""
        model = self.build(num_labels)
        if isinstance(adapter, LoraConfig):
            adapter.modules_to_save = list(find_head(model, find_blocks(model)).modules)
        with torch.device("meta"):
            return get_peft_model(model, adapter)

    def backbone_parameters(self) -> int:
        """Parameters of the model without its head."""
        return _num_parameters(self.build()) - self.head_parameters("model", 2)

    def head_parameters(self, head_type: str, num_labels: int) -> int:
        """Parameters of one task's head, counted on an attached adapter."""
        key = (head_type, num_labels)
        if key not in self._heads:
            adapter = SpartanConfig(head_type=head_type, num_labels=num_labels)
            self._heads[key] = _head_parameters(self.attach(adapter, num_labels))
        return self._heads[key]

    def own(self, method: str) -> _Own:
        """A method's own parameters for one task."""
        counts: dict[str, Callable[[], _Own]] = {
            "full": self._full,
            "houlsby": self._houlsby,
            "pfeiffer": self._pfeiffer,
            "lora": self._lora,
            "spartan": self._spartan,
        }
        return counts[method]()

    def _full(self) -> _Own:
        count = self.backbone_parameters()
        return _Own(count, f"N = {count:,}", count, "model")

    def _spartan(self) -> _Own:
        parents = self.sizes.num_parents
        # top_k changes no count, but may not exceed the parents.
        adapter = SpartanConfig(num_parents=parents, num_children=self.sizes.num_children, top_k=min(8, parents))
        formula, value = adapter.parameter_formula(self.widths)
        return _Own(_own_parameters(self.attach(adapter)), formula, value, "attached adapter")

    def _lora(self) -> _Own:
        rank = self.sizes.lora_rank
        try:
            model = self.attach(LoraConfig(r=rank))
        except ValueError as error:  # no default modules for the architecture
            raise UserError(
                f"LoRA cannot be counted for {self.config.model_type!r} models ({str(error).rstrip('.')}); leave "
                "'lora' out of the methods."
            ) from error
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        shapes = Counter((int(layer.in_features or 0), int(layer.out_features or 0)) for layer in layers.values())
        value = rank * sum(n * (width_in + width_out) for (width_in, width_out), n in shapes.items())
        terms = " + ".join(f"{n}·({width_in}+{width_out})" for (width_in, width_out), n in shapes.items())
        names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        formula = f"rΣ(d_in+d_out) = {rank}·{terms if len(shapes) == 1 else f'[{terms}]'} = {value:,} ({names})"
        return _Own(_own_parameters(model), formula, value, "attached adapter")

    def _pfeiffer(self) -> _Own:
        return self._bottleneck(1, "L", "")

    def _houlsby(self) -> _Own:
        return self._bottleneck(2, "2L", "2·")

    def _bottleneck(self, per_layer: int, symbol: str, factor: str) -> _Own:
        """Two linear layers with biases, d -> d/r -> d, once or twice per layer."""
        shapes = Counter((d, max(1, d // self.sizes.reduction_factor)) for d in self.widths)
        value = per_layer * sum(n * (2 * d * inner + inner + d) for (d, inner), n in shapes.items())
        terms = " + ".join(f"{n}·(2·{d}·{inner} + {inner} + {d})" for (d, inner), n in shapes.items())
        numbers = f"{factor}{terms}" if len(shapes) == 1 or not factor else f"{factor}[{terms}]"
        return _Own(value, f"{symbol}(2d(d/r) + d/r + d) = {numbers} = {value:,}", value, "formula")


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head_parameters(model: nn.Module) -> int:
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return sum(_num_parameters(wrapper.modules_to_save) for wrapper in wrappers)


def _own_parameters(model: nn.Module) -> int:
    """Everything trainable but the head."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable - _head_parameters(model)


def _load_config(model: str) -> PreTrainedConfig:
    if model in _ROBERTA_BASE_NAMES and not Path(model).is_dir():
        return RobertaConfig.from_dict(_ROBERTA_BASE_SIZES | {"layer_norm_eps": 1e-5})
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"No config for the model {model!r} could be had ({reason}); pass a local folder with config.json, or the "
            "id of a model on the hub (which needs a network or its cache)."
        ) from error


# -- the paper's figures ----------------------------------------------------------------------------------------------


def _is_roberta_base(config: PreTrainedConfig) -> bool:
    sizes = all(getattr(config, name, None) == value for name, value in _ROBERTA_BASE_SIZES.items())
    return config.model_type == "roberta" and sizes


def _paper_figures() -> tuple[PaperFigure, ...]:
    d, num_layers = _ROBERTA_BASE_SIZES["hidden_size"], _ROBERTA_BASE_SIZES["num_hidden_layers"]
    spartan = 2 * (_PAPER_PARENTS + _PAPER_PARENTS * _PAPER_CHILDREN) * d * num_layers
    pfeiffer = 2 * d * (d // _PAPER_REDUCTION) * num_layers
    return (
        PaperFigure("full", "T N", 123_000_000, 1_107_000_000, 4_430_000_000, "9x"),
        PaperFigure("houlsby", "N + 4T d(d/r)L", 2 * pfeiffer, 144_230_000, 580_000_000, "1.2x"),
        PaperFigure("pfeiffer", "N + 2T d(d/r)L", pfeiffer, 133_620_000, 530_000_000, "1.1x"),
        PaperFigure("spartan", "N + 2T(P+PC)dL", spartan, 133_620_000, 530_000_000, "1.1x"),
    )


def _paper_notes(counter: _Counter, backbone: int, num_tasks: int) -> tuple[str, ...]:
    """One sentence for each difference between the paper's figures and this report's."""
    paper = {figure.method: figure for figure in _paper_figures()}
    sizes = _Sizes(_PAPER_REDUCTION, counter.sizes.lora_rank, _PAPER_PARENTS, _PAPER_CHILDREN, "model")
    at_paper_sizes = _Counter(counter.config, sizes)
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
