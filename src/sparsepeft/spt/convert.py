"""Putting sparse parts into a model, in place, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.models.sublayers import FeedForward
from sparsepeft.spt.attention import NAME, CodebookRefresh, SparseAttention
from sparsepeft.spt.checkpoint import SparseSettings, save_densely
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.report import SptReport
from sparsepeft.spt.router import InitialRouter
from sparsepeft.spt.state import Settings
from sparsepeft.spt.steps import OptimizerSteps

_ATTRIBUTE = "sparsification"


@dataclass
class Sparsification:
    """How a model was made sparse; kept as ``model.sparsification``, to be inspected and undone.

    Attributes:
        config: with ``top_l`` as a count.
        report: how well it fits, on the calibration batch.
        attention: the sparse layers, by the attention module's name.
        feed_forwards: what was replaced, and by what.
    """

    config: SptConfig
    context: SparseContext
    report: SptReport = field(default_factory=SptReport)
    attention: dict[str, SparseAttention] = field(default_factory=dict)
    feed_forwards: list[tuple[FeedForward, RoutedFeedForward]] = field(default_factory=list)
    attention_before: str | None = None
    steps: OptimizerSteps | None = None
    loading: RemovableHandle | None = None


def sparsification(model: nn.Module) -> Sparsification | None:
    """What :func:`sparsify` did to ``model`` (or to the model inside a ``PeftModel``); None if it is dense."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(bare, _ATTRIBUTE, None)


def check_bare(caller: str, model: Any) -> None:
    """Refuse anything but a transformers model that PEFT has not wrapped.

    Raises:
        TypeError: it is.
    """
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{caller} got a {type(model).__name__}; expected a transformers model: call it before get_peft_model."
        )


def install(
    model: PreTrainedModel,
    config: SptConfig,
    codebooks: dict[str, Codebooks],
    feed_forwards: list[tuple[FeedForward, InitialRouter]],
    settings: Tensor | None = None,
) -> Sparsification:
    """Put sparse attention and sparse FFNs into a model, given their codebooks and routers.

    Modules whose settings (:meth:`SptConfig.of`) say so stay dense. ``settings`` is the config as a file has it.
    """
    context = SparseContext(config)
    state = Sparsification(config, context)
    for name, books in codebooks.items():
        if (own := config.of(name)) is not None:
            module: Any = model.get_submodule(name)
            module.spt = state.attention[name] = SparseAttention(books, own, context)
    if state.attention:
        state.attention_before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
    for feed_forward, start in feed_forwards:
        if (own := config.of(feed_forward.name)) is not None:
            routed = RoutedFeedForward(feed_forward, start, own, context)
            state.feed_forwards.append((feed_forward, routed))
            _place(model, feed_forward, routed)
    context.watch(model)
    state.loading = save_densely(model, state.feed_forwards)
    model.spt_settings = SparseSettings(model, state.feed_forwards, Settings(config, settings), context)
    listeners: list[Callable[[int], None]] = []
    if state.attention and config.codebook_interval:
        listeners.append(CodebookRefresh(list(state.attention.values()), config.codebook_interval).after_step)
    if config.dense_steps:
        context.steps = model.spt_settings
        listeners.append(context.count_step)
    if listeners:
        state.steps = OptimizerSteps(model, listeners)
    setattr(model, _ATTRIBUTE, state)
    return state


def desparsify(model: PreTrainedModel) -> PreTrainedModel:
    """Make a sparse model dense again, in place: the weights are those from before, bit for bit, or as trained since.

    Raises:
        ValueError: the model is not sparse, or is still wrapped by PEFT.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft import SptConfig
        >>> model = AutoModelForCausalLM.from_pretrained("MODEL")
        >>> ids = torch.randint(5, 90, (2, 32))  # of typical text
        >>> dense = model(ids).logits
        >>> model = desparsify(sparsify(model, SptConfig(top_l=8, num_blocks=4), calibration_data=ids))
        >>> torch.equal(model(ids).logits, dense)
        True
    """
    if isinstance(model, PeftModel):
        raise ValueError("desparsify got a PeftModel; call its merge_and_unload or unload first.")
    state = sparsification(model)
    if state is None:
        raise ValueError("The model is not sparse, so there is nothing to undo.")
    state.context.unwatch()
    settings: Any = model.spt_settings
    settings.detach()
    del model.save_pretrained
    if state.loading is not None:
        state.loading.remove()
    del model.spt_settings
    for feed_forward, routed in state.feed_forwards:
        _uninstall(model, feed_forward, routed)
    for name in state.attention:
        del model.get_submodule(name).spt
    if state.attention_before is not None:
        model.set_attn_implementation(state.attention_before)
    delattr(model, _ATTRIBUTE)
    return model


def _place(model: nn.Module, feed_forward: FeedForward, routed: RoutedFeedForward) -> None:
    routed.train(feed_forward.owner.training)
    if feed_forward.is_module:
        _replace(model, feed_forward.name, routed)
        return
    names = feed_forward.names
    for name in (names.up, names.down):
        _replace(feed_forward.owner, name, _unchanged)
    _replace(feed_forward.owner, names.activation, routed)


def _uninstall(model: nn.Module, feed_forward: FeedForward, routed: RoutedFeedForward) -> None:
    released = routed.release()
    if feed_forward.is_module:
        _replace(model, feed_forward.name, feed_forward.owner)
    else:
        _replace(feed_forward.owner, feed_forward.names.activation, feed_forward.activation)
    for name, projection in released.items():
        _replace(feed_forward.owner, name, projection)


def _replace(root: nn.Module, name: str, part: Any) -> None:
    """Replace a module or function by a module or function."""
    path, _, last = name.rpartition(".")
    parent = root.get_submodule(path)
    parent.__dict__.pop(last, None)
    if isinstance(part, nn.Module):
        parent._modules[last] = part
    else:
        # A function is found before the modules. The empty place keeps their order, and with it the parameters'.
        if last in parent._modules:
            parent._modules[last] = None
        parent.__dict__[last] = part


def _unchanged(hidden_states: Tensor) -> Tensor:
    """Stands in for a projection that the routed FFN computes; a function, so that LoRA does not target it."""
    return hidden_states
