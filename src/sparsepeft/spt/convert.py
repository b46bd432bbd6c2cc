"""Putting sparse parts into a model, in place, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.layers.router import InitialRouter
from sparsepeft.models.optimizer_steps import OptimizerSteps
from sparsepeft.models.sublayers import FeedForward
from sparsepeft.planning import Plan
from sparsepeft.spt.attention import (
    NAME,
    CodebookRefresh,
    Implementations,
    SparseAttention,
    implementations,
    set_implementations,
)
from sparsepeft.spt.checkpoint import SparseSettings, save_densely
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import SparseFeedForward, make_sparse
from sparsepeft.spt.report import SptReport
from sparsepeft.spt.state import Settings
from sparsepeft.tuners.config import TaskAdapterConfig

_ATTRIBUTE = "sparsification"


@dataclass
class Sparsification:
    """How a model was made sparse; kept as ``model.sparsification``, to be inspected and undone.

    Attributes:
        config: with ``top_l`` as a count.
        report: how well it fits, on the calibration batch.
        attention: the sparse layers, by the attention module's name.
        feed_forwards: what was replaced, and by what.
        plan: how the settings of single modules were chosen, where a budget was given.
    """

    config: SptConfig
    context: SparseContext
    report: SptReport = field(default_factory=SptReport)
    plan: Plan | None = None
    attention: dict[str, SparseAttention] = field(default_factory=dict)
    feed_forwards: list[tuple[FeedForward, SparseFeedForward]] = field(default_factory=list)
    attention_before: Implementations = field(default_factory=list)
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
    feed_forwards: list[tuple[FeedForward, InitialRouter | None]],
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
            module.spt = state.attention[name] = SparseAttention(books, own, context).train(module.training)
    # Towers of other modalities attend as before.
    state.attention_before = implementations(model, around=state.attention)
    set_implementations([(each, NAME) for each, _ in state.attention_before])
    for feed_forward, start in feed_forwards:
        if (own := config.of(feed_forward.name)) is not None:
            sparse = make_sparse(feed_forward, start, own, context)
            state.feed_forwards.append((feed_forward, sparse))
            _place(model, feed_forward, sparse)
            _set_inner_dropout(feed_forward, 0.0)
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


def desparsify(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Make a sparse model dense again, in place: the weights are those from before, bit for bit, or as trained since.

    Adapters of ``peft`` may be on it: they stay, as adapters of the dense model, which can be saved for, or merged by,
    somebody without this package.

    Raises:
        ValueError: the model is not sparse, or an adapter acts on its sparse parts themselves.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft import SptConfig, sparsify
        >>> model = AutoModelForCausalLM.from_pretrained("MODEL")
        >>> ids = torch.randint(5, 90, (2, 32))  # of typical text
        >>> dense = model(ids).logits
        >>> model = desparsify(sparsify(model, SptConfig(top_l=8, num_blocks=4), calibration_data=ids))
        >>> torch.equal(model(ids).logits, dense)
        True
    """
    state = sparsification(model)
    if state is None:
        raise ValueError("The model is not sparse, so there is nothing to undo.")
    if isinstance(model, PeftModel):
        _check_adapters(model)
        _take_out(model.get_base_model(), state)
    else:
        _take_out(model, state)
    return model


def _check_adapters(model: PeftModel) -> None:
    for config in model.peft_config.values():
        if isinstance(config, TaskAdapterConfig):
            raise ValueError(
                f"desparsify got a model with an adapter of {type(config).__name__}, which belongs to the sparse "
                "backbone; call the model's unload first, or answer densely inside sparsepeft.spt.answering."
            )


def _take_out(model: Any, state: Sparsification) -> None:
    state.context.unwatch()
    settings: Any = model.spt_settings
    settings.detach()
    del model.save_pretrained
    if state.loading is not None:
        state.loading.remove()
    del model.spt_settings
    for feed_forward, sparse in state.feed_forwards:
        _uninstall(model, feed_forward, sparse)
    for name in state.attention:
        del model.get_submodule(name).spt
    set_implementations(state.attention_before)
    delattr(model, _ATTRIBUTE)


def _place(model: nn.Module, feed_forward: FeedForward, sparse: SparseFeedForward) -> None:
    sparse.train(feed_forward.owner.training)
    if feed_forward.is_module:
        _replace(model, feed_forward.name, sparse)
        return
    names = feed_forward.names
    for name in (names.up, names.down):
        _replace(feed_forward.owner, name, _unchanged)
    _replace(feed_forward.owner, names.activation, sparse)


def _uninstall(model: nn.Module, feed_forward: FeedForward, sparse: SparseFeedForward) -> None:
    released = sparse.release()
    if feed_forward.is_module:
        _replace(model, feed_forward.name, feed_forward.owner.train(sparse.training))
    else:
        _replace(feed_forward.owner, feed_forward.names.activation, feed_forward.activation)
        _set_inner_dropout(feed_forward, getattr(sparse, feed_forward.names.inner_dropout or "", 0.0))
    for name, projection in released.items():
        _replace(feed_forward.owner, name, projection)


def _set_inner_dropout(feed_forward: FeedForward, probability: float) -> None:
    """Of a layer, which would drop what the sparse FFN in its activation's place gives, and not neurons."""
    if not feed_forward.is_module and feed_forward.names.inner_dropout is not None:
        setattr(feed_forward.owner, feed_forward.names.inner_dropout, probability)


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
    """Stands in for a projection that the sparse FFN computes; a function, so that LoRA does not target it."""
    return hidden_states
