"""Recomputing a backbone's activations in the backward pass (gradient checkpointing) below and above adapters."""

from __future__ import annotations

from typing import Any

_DEFAULT = {"use_reentrant": False}  # transformers' own


class GradientCheckpointing:
    """Of a tuner: like its ``model``'s own, but without gradients that nothing needs."""

    model: Any

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Like the model's own, but only reentrant checkpoints, which need them, make gradients of the embeddings.

        Others, such as those that are made by default, leave the backward pass to end at the lowest adapter.
        """
        given = _DEFAULT if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        self.model.disable_input_require_grads()  # an earlier call's, or the model would lose the handles of its hooks
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **kwargs)
        self._set_input_gradients(given)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """The newer name of :meth:`gradient_checkpointing_enable` in transformers."""
        given = _DEFAULT if activation_checkpointing_kwargs is None else activation_checkpointing_kwargs
        self.model.disable_input_require_grads()
        self.model.activation_checkpointing_enable(given, *args, **kwargs)
        self._set_input_gradients(given)

    def gradient_checkpointing_disable(self) -> None:
        """Like the model's own; takes away what enabling added to the embeddings, too."""
        self.model.gradient_checkpointing_disable()
        self.model.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """The newer name of :meth:`gradient_checkpointing_disable` in transformers."""
        self.model.activation_checkpointing_disable()
        self.model.disable_input_require_grads()

    def _set_input_gradients(self, checkpoints: dict[str, Any]) -> None:
        """Let gradients reach the embeddings for reentrant checkpoints alone, whatever transformers has done."""
        self.model.disable_input_require_grads()
        if checkpoints.get("use_reentrant", True):  # PyTorch may take them where nothing is said
            self.model.enable_input_require_grads()
