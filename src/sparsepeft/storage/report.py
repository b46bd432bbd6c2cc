"""The report that ``sparsepeft storage`` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsepeft.arguments import check_choice, check_whole
from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.models.quantized import INT8
from sparsepeft.storage.counting import METHODS, ParameterCounter, Sizes, load_config, safetensors_bytes
from sparsepeft.tuners.config import HEAD_TYPES, SAVE_DTYPES, dtype_name
from sparsepeft.tuners.spartan import PARENT_KEYS


@dataclass(frozen=True)
class MethodStorage:
    """One method's share of a :class:`StorageReport`.

    Attributes:
        method: one of :data:`METHODS`.
        parameters_per_task: trained for each task, without the head.
        head_type: ``"model"`` (the model's own) or ``"linear"``.
        head_parameters_per_task: the head's, for each task.
        bytes_per_task: what each task adds to the device, head (in int8 also scales) included, without the header.
        file_bytes_per_task: the exact size of each task's file of weights, header included.
        total_parameters, total_bytes: for all tasks, heads included, the backbone counted once (full fine-tuning: a
            copy per task).
        total_parameters_without_heads: the same without heads, as the paper counts.
        ratio: ``total_bytes`` over one bare backbone's bytes.
        ratio_text: the same for a table, such as ``"1.1x"``.
        formula: the closed formula for ``parameters_per_task``, written out.
        formula_parameters: its value.
        counted: where ``parameters_per_task`` comes from: ``"model"`` or ``"attached adapter"``.
    """

    method: str
    parameters_per_task: int
    head_type: str
    head_parameters_per_task: tuple[int, ...]
    bytes_per_task: tuple[int, ...]
    file_bytes_per_task: tuple[int, ...]
    total_parameters: int
    total_parameters_without_heads: int
    total_bytes: int
    ratio: float
    ratio_text: str
    formula: str
    formula_parameters: int
    counted: str


@dataclass(frozen=True)
class StorageReport:
    """What a device stores, method by method; ``notes`` say which methods were left out, and why."""

    model: str
    num_tasks: int
    num_labels: tuple[int, ...]
    dtype: str
    backbone_parameters: int
    backbone_bytes: int
    methods: tuple[MethodStorage, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        ratios = ", ".join(f"{each.method} {each.ratio_text}" for each in self.methods)
        return f"StorageReport({self.model!r}, {self.num_tasks} tasks, {self.dtype}: {ratios})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


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
    parent_keys: str = "flat",
    head_type: str = "model",
    train_layer_norms: bool = False,
    save_dtype: str | None = None,
) -> StorageReport:
    """Count what each method stores for ``num_tasks`` tasks. Reads a config, no weights.

    Bytes are parameters times the dtype's width; files have a header of a few kilobytes more. A head is what
    follows the backbone in the model class; a pooler that a checkpoint lacks (and training would add to the head)
    cannot be told from a config.

    Args:
        model: hub id or local folder, ``"minilm"``, or ``"roberta-base"``, whose sizes are built in.
        num_tasks: tasks on the device.
        num_labels: outputs of every task's head, or one number per task.
        dtype: of the backbone and all that is trained: ``"float32"`` or ``"fp32"``, ``"bfloat16"`` or ``"bf16"``,
            ``"float16"`` or ``"fp16"``.
        methods: which of :data:`METHODS`, in the order of the report; None takes all that the
            architecture allows, with a note on the others.
        reduction_factor: of Houlsby and Pfeiffer adapters (bottleneck d / r).
        lora_rank: rank of LoRA on PEFT's default modules for the architecture.
        num_parents, num_children: SPARTAN's P and C.
        parent_keys: ``"flat"`` or ``"product"``: see :class:`sparsepeft.SpartanConfig`.
        train_layer_norms: SPARTAN's tasks also have norms of their own, as the recipe "best" trains them.
        save_dtype: of the tasks' files, where this package's methods write them: also ``"int8"``; None takes ``dtype``.
        head_type: of SPARTAN and the adapters; full fine-tuning and LoRA always train the model's own head.

    Raises:
        UserError: an unknown method, an impossible size, or a model whose config cannot be had or attached to.
    """
    num_labels = _check(num_tasks, num_labels, methods)
    notes: tuple[str, ...] = ()
    sizes = Sizes(reduction_factor, lora_rank, num_parents, num_children, head_type, train_layer_norms, parent_keys)
    try:
        dtype = dtype_name("dtype", dtype)
        save_dtype = dtype_name("save_dtype", save_dtype, SAVE_DTYPES) if save_dtype is not None else dtype
        check_choice("head_type", head_type, HEAD_TYPES)
        check_choice("parent_keys", parent_keys, PARENT_KEYS)
        for name in ("reduction_factor", "lora_rank", "num_parents", "num_children"):
            check_whole(name, getattr(sizes, name))
        resolved = resolve_model(model)
        config = load_config(resolved)
        counter = ParameterCounter(config, sizes)
        backbone = counter.backbone_parameters()
        torch_dtype = getattr(torch, dtype)
        rows = []
        for method in dict.fromkeys(methods or METHODS):
            try:
                rows.append(_row(counter, method, num_labels, backbone, dtype, save_dtype))
            except UserError as error:
                if methods is not None:
                    raise
                notes = (*notes, f"{method} is left out: {error}")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return StorageReport(
        model=describe_backbone(resolved),
        num_tasks=num_tasks,
        num_labels=num_labels,
        dtype=dtype,
        backbone_parameters=backbone,
        backbone_bytes=backbone * torch_dtype.itemsize,
        methods=tuple(rows),
        notes=notes,
    )


def _check(num_tasks: int, num_labels: int | Sequence[int], methods: Sequence[str] | None) -> tuple[int, ...]:
    """Check what needs no model; the number of labels of each task."""
    check_whole("num_tasks", num_tasks)
    labels = (num_labels,) * num_tasks if isinstance(num_labels, int) else tuple(num_labels)
    for count in labels:
        check_whole("num_labels", count)
    if len(labels) != num_tasks:
        raise UserError(
            f"`num_labels` has {len(labels)} entries, but `num_tasks={num_tasks}` was given; give one number for "
            "all, or one per task."
        )
    if methods is None:
        return labels
    if isinstance(methods, str) or not methods:
        raise UserError(f"`methods={methods!r}` was given, but it must be a list with some of {', '.join(METHODS)}.")
    for method in methods:
        if method not in METHODS:
            raise UserError(unknown_name("method", str(method), METHODS))
    return labels


def _row(
    counter: ParameterCounter, method: str, num_labels: tuple[int, ...], backbone: int, dtype: str, save_dtype: str
) -> MethodStorage:
    own = counter.own(method)
    head_type = "model" if method in ("full", "lora") else counter.sizes.head_type
    heads = tuple(counter.head_parameters(head_type, count) for count in num_labels)
    without_heads = (0 if method == "full" else backbone) + own.parameters * len(heads)
    total = without_heads + sum(heads)
    saved_dtype = dtype if method in ("full", "lora") else save_dtype
    saved = {count: counter.saved_tensors(method, count, saved_dtype) for count in sorted(set(num_labels))}
    width = getattr(torch, dtype).itemsize
    if saved_dtype == INT8:  # scales and vectors are float32
        added = tuple(sum(tensor.nbytes for tensor in saved[count].values()) for count in num_labels)
    else:
        added = tuple((own.parameters + head) * getattr(torch, saved_dtype).itemsize for head in heads)
    total_bytes = (0 if method == "full" else backbone * width) + sum(added)
    ratio = total_bytes / (backbone * width)
    return MethodStorage(
        method=method,
        parameters_per_task=own.parameters,
        head_type=head_type,
        head_parameters_per_task=heads,
        bytes_per_task=added,
        file_bytes_per_task=tuple(safetensors_bytes(saved[count]) for count in num_labels),
        total_parameters=total,
        total_parameters_without_heads=without_heads,
        total_bytes=total_bytes,
        ratio=ratio,
        ratio_text=_ratio_text(ratio),
        formula=own.formula,
        formula_parameters=own.formula_parameters,
        counted=own.counted,
    )


def _ratio_text(ratio: float) -> str:
    text = f"{ratio:.1f}"
    return f"{text.removesuffix('.0') if ratio >= 2 else text}x"
