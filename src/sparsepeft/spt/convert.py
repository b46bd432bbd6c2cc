"""Making a model sparse, in place, and dense again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.spt.attention import NAME, CodebookRefresh, SparseAttention
from sparsepeft.spt.calibration import attend_densely, calibration_batch, initial_router, layer_codebooks
from sparsepeft.spt.checkpoint import SparseSettings, save_densely
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.feed_forward import RoutedFeedForward, inner_tensors
from sparsepeft.spt.report import SptReport, report_attention, report_feed_forwards, watching
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


def sparsify(model: PreTrainedModel, config: SptConfig, calibration_data: Any = None) -> PreTrainedModel:
    """Make a model's self-attention and FFNs sparse, in place; PEFT methods go on top afterwards.

    Args:
        model: a transformers model, not yet wrapped by PEFT.
        config: what becomes sparse.
        calibration_data: a typical batch: input ids (B, T), or (T,) for one sequence, as a tensor or lists, or the
            mapping that the model takes.
            Codebooks are made from its queries and keys, and a fraction ``top_l`` is of its length T. Not needed
            without ``attention``.

    Returns:
        ``model``; ``model.sparsification.report`` says how much it changed.

    Raises:
        TypeError: ``model`` is no bare transformers model, or ``config`` no :class:`SptConfig`.
        ValueError: the model lacks a structure that is needed, sizes do not fit, or the calibration data is unusable.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft import SptConfig
        >>> model = AutoModelForCausalLM.from_pretrained("MODEL")
        >>> ids = torch.randint(5, 90, (2, 32))  # of typical text
        >>> model = sparsify(model, SptConfig(top_l=8, num_blocks=4, num_active_blocks=2), calibration_data=ids)
        >>> model.sparsification.config.top_l
        8
    """
    check_bare("sparsify", model)
    if not isinstance(config, SptConfig):
        raise TypeError(f"sparsify got a {type(config).__name__} as its config; expected an SptConfig.")
    if sparsification(model) is not None:
        raise ValueError("The model is sparse already; call desparsify first to convert it with other settings.")
    batch = None if calibration_data is None else calibration_batch(model, calibration_data)
    if config.attention:
        if batch is None:
            raise ValueError("Sparse attention needs calibration_data for its codebooks; pass a batch of input ids.")
        config = config.with_length(next(iter(batch.values())).shape[1])
    if config.ffn and config.compensation_rank and batch is None:
        raise ValueError(
            f"compensation_rank={config.compensation_rank} needs calibration_data to be fitted to; pass a batch of "
            "input ids, or compensation_rank=0."
        )
    # All that can go wrong does so before the model is touched.
    feed_forwards = find_feed_forwards(model, config.layers_to_transform) if config.ffn else []
    for feed_forward in feed_forwards:
        _check_blocks(feed_forward, config)
    with watching(feed_forwards) as seen:
        calls = attend_densely(model, config, batch) if batch is not None else {}
    starts = [initial_router(feed_forward, config, batch, seen) for feed_forward in feed_forwards]
    codebooks = {name: layer_codebooks(name, call, config) for name, call in calls.items()}

    state = install(model, config, codebooks, list(zip(feed_forwards, starts, strict=True)))
    for name, layer in state.attention.items():
        report_attention(state.report, name, layer, calls[name])
    if batch is not None:
        report_feed_forwards(state.report, state.feed_forwards, seen, config)
    return model


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
    codebooks: dict[str, Tensor],
    feed_forwards: list[tuple[FeedForward, InitialRouter]],
) -> Sparsification:
    """Put sparse attention and routed FFNs into a model, given their codebooks and routers."""
    context = SparseContext(config)
    state = Sparsification(config, context)
    for name, books in codebooks.items():
        module: Any = model.get_submodule(name)
        module.spt = state.attention[name] = SparseAttention(books, config, context)
    if codebooks:
        state.attention_before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
    for feed_forward, start in feed_forwards:
        state.feed_forwards.append((feed_forward, _install(model, feed_forward, start, state)))
    context.watch(model)
    state.loading = save_densely(model, state.feed_forwards)
    model.spt_settings = SparseSettings(model, state.feed_forwards, Settings(config), context)
    listeners: list[Callable[[int], None]] = []
    if codebooks and config.codebook_interval:
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


def _check_blocks(feed_forward: FeedForward, config: SptConfig) -> None:
    for name in feed_forward.projection_names:  # raises where they cannot be reordered
        list(inner_tensors(feed_forward.part(name), name, name != feed_forward.names.down))
    inner = feed_forward.sizes[1]
    if inner % config.num_blocks:
        divisors = ", ".join(str(n) for n in range(1, 65) if inner % n == 0)
        raise ValueError(
            f"{feed_forward.name} has {inner} neurons, which num_blocks={config.num_blocks} does not divide; choose "
            f"one of {divisors}."
        )


def _install(
    model: nn.Module, feed_forward: FeedForward, start: InitialRouter, state: Sparsification
) -> RoutedFeedForward:
    routed = RoutedFeedForward(feed_forward, start, state.config, state.context)
    routed.train(feed_forward.owner.training)
    if feed_forward.is_module:
        _replace(model, feed_forward.name, routed)
        return routed
    names = feed_forward.names
    for name in (names.up, names.down):
        _replace(feed_forward.owner, name, _unchanged)
    _replace(feed_forward.owner, names.activation, routed)
    return routed


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
