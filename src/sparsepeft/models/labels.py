"""The labels in a model's config, which follow the active adapter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Labels:
    """What a model's config says about one adapter's labels.

    Attributes:
        num_labels: outputs of the head.
        id2label: their names, by index.
        problem_type: transformers' name for the loss; None lets transformers decide.
    """

    num_labels: int
    id2label: dict[int, str]
    problem_type: str | None


class LabelState:
    """Keeps ``model.config`` (and ``model.num_labels``) at the active adapter's labels.

    What is written into the config meanwhile, names of labels or the loss that transformers decides on, is the active
    adapter's, and comes back with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = (model,)  # in a tuple, or torch would register the model as a submodule of its own head
        self.original = self._read()
        self._per_adapter: dict[str, Labels] = {}
        self._active: str | None = None
        self._enabled = True

    def add(self, adapter_name: str, labels: Labels) -> None:
        """Note an adapter's labels, for when it is active."""
        self._per_adapter[adapter_name] = labels

    def remove(self, adapter_name: str) -> None:
        """Forget an adapter's labels."""
        if adapter_name == self._active:
            self.activate(None)
        self._per_adapter.pop(adapter_name, None)

    def activate(self, adapter_name: str | None) -> None:
        """Set the config to an adapter's labels, or back to the bare model's (None)."""
        self._keep_changes()
        self._active = adapter_name
        self._write()

    def enable(self, enabled: bool) -> None:
        """Follow the active adapter, or keep to the bare model's labels."""
        self._keep_changes()
        self._enabled = enabled
        self._write()

    def describe(self, adapter_name: str, config: Any) -> None:
        """Write an adapter's labels, as they are now, into its config."""
        self._keep_changes()
        labels = self._per_adapter.get(adapter_name)
        if labels is not None:
            config.id2label = {int(index): str(label) for index, label in labels.id2label.items()}
            config.problem_type = labels.problem_type

    def _in_use(self) -> Labels:
        return self._per_adapter.get(self._active or "", self.original) if self._enabled else self.original

    def _read(self) -> Labels:
        config: Any = self._model[0].config
        return Labels(config.num_labels, dict(config.id2label or {}), getattr(config, "problem_type", None))

    def _keep_changes(self) -> None:
        """Take over what was written into the config since."""
        labels, current = self._in_use(), self._read()
        labels.problem_type = current.problem_type
        if current.num_labels == labels.num_labels:
            labels.id2label = current.id2label
        else:
            warnings.warn(
                f"The model's config names {current.num_labels} labels now, but the head in use has "
                f"{labels.num_labels} outputs, so the names it had come back; set num_labels in an adapter's config "
                "before it is attached.",
                UserWarning,
                stacklevel=2,
            )

    def _write(self) -> None:
        labels = self._in_use()
        model: Any = self._model[0]
        model.config.id2label = dict(labels.id2label)
        model.config.label2id = {label: index for index, label in labels.id2label.items()}
        model.config.problem_type = labels.problem_type
        if hasattr(model, "num_labels"):
            model.num_labels = labels.num_labels
