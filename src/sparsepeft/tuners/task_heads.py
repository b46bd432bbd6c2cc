"""Giving an adapter a head of its own: its copy of the model's head, or one linear layer, and its labels."""

from __future__ import annotations

from peft import TaskType
from torch import nn

from sparsepeft.models.context import ForwardContext
from sparsepeft.models.head_search import HeadSpec, original
from sparsepeft.models.heads import HeadModule, LinearHead
from sparsepeft.models.labels import Labels, LabelState
from sparsepeft.tuners.config import TaskAdapterConfig
from sparsepeft.tuners.head_copies import check_copyable, copy_with_labels, move_unless_meta
from sparsepeft.tuners.layer import execution_device

_CLASSES_PER_POSITION = ("ForTokenClassification", "ForQuestionAnswering", "FrameClassification")


def check_head(model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> None:
    """Refuse options of a head that the model does not have, and heads that cannot be trained.

    Raises:
        ValueError: there is no layer of labels to resize or replace, or a quantized one that cannot be decoded.
    """
    for name in head.modules if config.head_type == "model" else ():
        check_copyable(original(model.get_submodule(name)), name)
    if head.output is not None:
        return
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if config.num_labels is not None and (not head.modules or config.num_labels != labels):
        raise ValueError(
            f"num_labels={config.num_labels} was given, but the head of {type(model).__name__} has no layer with "
            "num_labels outputs to resize; leave num_labels unset or use a model with a classification head."
        )
    if config.head_type == "linear":
        raise ValueError(
            f"head_type='linear' needs a model with a classification head, and {type(model).__name__} has none; "
            "use head_type='model'."
        )


def add_head(
    model: nn.Module, adapter_name: str, config: TaskAdapterConfig, head: HeadSpec, context: ForwardContext
) -> None:
    """Wrap the model's head where no adapter has yet, add the adapter's own, and note its labels in ``config``."""
    if context.labels is None:
        context.labels = LabelState(model)
    backbones = context.labels.original
    num_labels = config.num_labels or backbones.num_labels
    initializer_range = getattr(model.config, "initializer_range", 0.02)
    for name in head.modules:
        is_output = name == head.output
        module = model.get_submodule(name)
        copied: nn.Module | None
        if config.head_type == "model":
            linear = head.linear if is_output else None
            copied = copy_with_labels(original(module), linear, num_labels, initializer_range)
        elif is_output:
            copied = _linear_head(model, config, head, num_labels, initializer_range)
        else:
            copied = nn.Identity() if _may_be_pooled_between(model, config, head) else None
        if isinstance(module, HeadModule):
            module.update(adapter_name, copy=copied)
            continue
        is_first = name == head.modules[0]
        wrapper = HeadModule(module, adapter_name, copied, context, is_first=is_first, is_output=is_output)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper)
    is_models_own = num_labels == backbones.num_labels  # then the task has its label names and loss, too
    id2label = config.id2label or (dict(backbones.id2label) if is_models_own else None)
    problem_type = config.problem_type or (backbones.problem_type if is_models_own else None)
    labels = Labels(
        num_labels,
        id2label or {index: f"LABEL_{index}" for index in range(num_labels)},
        problem_type or ("regression" if num_labels == 1 else None),
    )
    config.head_modules, config.num_labels = list(head.modules), num_labels
    context.labels.add(adapter_name, labels)
    context.labels.describe(adapter_name, config)


def _linear_head(
    model: nn.Module, config: TaskAdapterConfig, head: HeadSpec, num_labels: int, initializer_range: float
) -> LinearHead:
    parts = [original(model.get_submodule(name)) for name in head.modules]
    linear = next(m for part in parts for m in part.modules() if isinstance(m, nn.Linear))
    created = LinearHead(
        linear.in_features,
        num_labels,
        _answers_per_position(model, config, head),
        initializer_range,
        position=-1 if getattr(parts[0], "summary_type", None) == "last" else 0,
        pooled_by_model=_may_be_pooled_between(model, config, head),
    )
    move_unless_meta(created, execution_device(original(model.get_submodule(head.output or ""))))
    return created


def _answers_per_position(model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> bool:
    """Whether the model's answers are of positions and not of whole inputs."""
    if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        return True
    if any(cls.__name__.endswith(_CLASSES_PER_POSITION) for cls in type(model).__mro__):
        return True
    return _is_linear_first(model, head) and len(head.modules) == 1


def _may_be_pooled_between(model: nn.Module, config: TaskAdapterConfig, head: HeadSpec) -> bool:
    """Whether the head projects its input, which may be of all positions, and its last module comes right after.

    Audio classifiers average what they have projected. A small head leaves the projection out (it may be fresh, and is
    not saved with it) and lets the model average the states themselves.
    """
    projects = _is_linear_first(model, head) and len(head.modules) == 2
    return projects and head.linear == "" and not _answers_per_position(model, config, head)


def _is_linear_first(model: nn.Module, head: HeadSpec) -> bool:
    return isinstance(original(model.get_submodule(head.modules[0])), nn.Linear)
