"""The options that all adapter methods share (layers, head, identity), and how PEFT learns of a method."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft  # noqa: F401 - before a part of it: threads that import both at once must take their locks in one order
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from sparsepeft.arguments import check_choice, check_whole
from sparsepeft.errors import UserError
from sparsepeft.models.quantized import INT8
from sparsepeft.reprs import changed_fields
from sparsepeft.tuners.card import write_card
from sparsepeft.tuners.files import convert_saved


class MethodName(str):
    """The name of a PEFT method outside PEFT's enum, which behaves like a member of it."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    def __str__(self) -> str:
        """As members are printed; ``get_model_status`` reads the name from it."""
        return f"PeftType.{self.value}"


SPARTAN = MethodName("SPARTAN")
HEAD = MethodName("HEAD")
BOTTLENECK = MethodName("BOTTLENECK")
BITFIT = MethodName("BITFIT")


def register(name: MethodName, config_class: type, tuner_class: Any) -> None:
    """Let ``get_peft_model``, ``PeftModel.from_pretrained`` and transformers find a method by its config's type."""
    key: Any = name  # PEFT's annotations say PeftType
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner_class.prefix


FORMAT_VERSION = 1
_IN_EVERY_FILE = ("peft_type", "auto_mapping", "peft_version", "backbone_fingerprint", "format_version")
HEAD_TYPES = ("model", "linear")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES |= {name: name for name in DTYPES.values()}
SAVE_DTYPES = DTYPES | {INT8: INT8}


def dtype_name(name: str, value: Any, valid: dict[str, str] = DTYPES) -> str:
    """Torch's name of a dtype given by that or its short name; a UserError if it is not among the ``valid`` ones."""
    check_choice(name, value, valid)
    return valid[value]


def _names(name: str, value: Any) -> list[str]:
    """Names as a list of plain strings, NumPy's as well; a UserError if that is not what was given."""
    names = list(value) if _has_several(value) else [None]
    if not all(isinstance(each, str) for each in names):
        raise UserError(f"`{name}={value!r}` was given, but it must be a list of names.")
    return [str(each) for each in names]


def _positions(value: Any) -> list[int] | int:
    """Positions of layers as plain ints; a UserError if that is not what was given."""
    if not _has_several(value):
        return check_whole("layers_to_transform", value, least=0)
    positions = [check_whole("layers_to_transform", each, least=0) for each in value]
    return sorted(positions) if isinstance(value, Set) else positions


def _has_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


@dataclass(repr=False)
class TaskAdapterConfig(PeftConfig):
    """Base of this package's PEFT configs.

    Args:
        target_modules: the Transformer layers to extend: a regular expression over full module names, or a list of
            names or suffixes. None finds them.
        layers_to_transform: positions within each stack to extend; None extends all.
        head_type: ``"model"`` trains a copy of the model's own head, ``"linear"`` one linear layer on the pooled
            states (a few kilobytes, where RoBERTa's head has 2.4 MB).
        head_modules: the modules that make up the head; None finds them, an empty list trains none.
        num_labels: outputs of this task's head; None takes the model's.
        id2label: names of the labels; None takes the model's if the count agrees.
        problem_type: ``"regression"``, ``"single_label_classification"`` or ``"multi_label_classification"``;
            None lets transformers decide from ``num_labels`` and the labels' dtype.
        save_dtype: dtype of the saved tensors, such as ``"bfloat16"`` or ``"bf16"``; None keeps the one in memory.
            ``"int8"`` stores all that has rows with a scale for each row, and vectors in float32. Checkpoints of
            ``Trainer`` (folders called ``checkpoint-<step>``) keep full precision, so that training resumes exactly;
            but those of an adapter that transformers' own ``add_adapter`` put on have this dtype, too, and for it
            ``"int8"`` is ignored with a warning.
        check_backbone: refuse to attach a saved adapter to another backbone than its own.
        backbone_fingerprint: filled in when the adapter is attached; compared when it is loaded.
        format_version: of the files written.
    """

    part_name: ClassVar[str] = "adapter"  # what a layer gets, as cards call it

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Transformer layers to extend."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Positions in each stack."})
    head_type: str = field(default="model", metadata={"help": "The head to train: 'model' or 'linear'."})
    head_modules: list[str] | None = field(default=None, metadata={"help": "Names of the head's modules."})
    num_labels: int | None = field(default=None, metadata={"help": "Outputs of the head."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of the labels."})
    problem_type: str | None = field(default=None, metadata={"help": "Which loss the task has."})
    save_dtype: str | None = field(default=None, metadata={"help": "Dtype of the saved tensors."})
    check_backbone: bool = field(default=True, metadata={"help": "Refuse another backbone than the recorded one."})
    backbone_fingerprint: dict[str, Any] | None = field(default=None, metadata={"help": "Sampled backbone values."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the saved files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._make_plain()
        self.formula: str | None = None  # filled in when attached: the adapter's parameter count, for its card
        self._resolved_names: dict[str, list[str]] = {}  # filled in when attached: the modules to extend
        self._foreign_modules: tuple[str, ...] = ()  # filled in by an engine: other tasks' modules in the model
        self._own_names: frozenset[str] = frozenset()  # filled in when attached: the tensors in its file
        # A config that arrives with a fingerprint was read from a file: its backbone is fixed.
        self._is_from_file = self.backbone_fingerprint is not None
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter's files have format version {self.format_version}, but this sparsepeft reads up to "
                f"{FORMAT_VERSION}; upgrade sparsepeft."
            )
        check_choice("head_type", self.head_type, HEAD_TYPES)
        if self.save_dtype is not None:
            self.save_dtype = dtype_name("save_dtype", self.save_dtype, SAVE_DTYPES)
        if self.id2label is not None:
            self.id2label = {int(index): str(label) for index, label in self.id2label.items()}
            if self.num_labels is None:
                self.num_labels = len(self.id2label)
            if sorted(self.id2label) != list(range(self.num_labels)):
                raise ValueError(
                    f"id2label names the labels {sorted(self.id2label)}, but num_labels={self.num_labels}; name each "
                    f"of 0 to {self.num_labels - 1} once."
                )
        if self.num_labels is not None:
            check_whole("num_labels", self.num_labels)

    def _make_plain(self) -> None:
        """Turn NumPy's scalars, and what holds several values, into what JSON can hold."""
        for each in fields(self):
            if isinstance(value := getattr(self, each.name), np.generic):
                setattr(self, each.name, value.item())
        if _has_several(self.target_modules):
            names = _names("target_modules", self.target_modules)
            self.target_modules = names if isinstance(self.target_modules, list) else sorted(names)
        if isinstance(self.head_modules, Set):
            raise UserError(
                f"`head_modules={self.head_modules!r}` was given, which has no order; pass a list that begins with the "
                "module that reads the backbone's states."
            )
        if self.head_modules is not None:
            self.head_modules = _names("head_modules", self.head_modules)
        if self.layers_to_transform is not None:
            self.layers_to_transform = _positions(self.layers_to_transform)

    def __repr__(self) -> str:
        return changed_fields(self, _IN_EVERY_FILE)

    @property
    def method(self) -> str:
        """The method's name, as ``adapter_config.json`` has it."""
        name: Any = self.peft_type
        return str(name.value)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and a model card that says how to load the adapter.

        The adapter's tensors, which a ``PeftModel`` has written before, get their ``save_dtype``.

        Raises:
            ValueError: ``save_dtype`` cannot hold a value; the tensors are left in full precision.
        """
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self)
        convert_saved(Path(save_directory), self.save_dtype, self._own_names)
