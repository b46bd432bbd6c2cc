"""Making a model sparse, in place, and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsepeft.errors import first_line
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.feed_forwards import FeedForward, find_feed_forwards
from sparsepeft.ops.sparse_attention import fit_codebooks
from sparsepeft.spt.adapters import SparseSettings
from sparsepeft.spt.attention import NAME, AttentionCall, SparseAttention, recording, vectors_of
from sparsepeft.spt.checkpoint import save_densely
from sparsepeft.spt.clustering import clustered_order
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.feed_forward import RoutedFeedForward
from sparsepeft.spt.projections import inner_tensors
from sparsepeft.spt.refresh import CodebookRefresh
from sparsepeft.spt.report import SptReport, report_attention, report_feed_forwards, watching
from sparsepeft.spt.router import (
    Start,
    activity,
    compensated,
    deciding_weight,
    inner_states,
    start_from_outputs,
    start_from_weights,
)
from sparsepeft.spt.state import Settings

_ATTRIBUTE = "sparsification"


@dataclass
class Sparsification:
    """What was done to a model: kept on it as ``model.sparsification``, so that it can be looked at and undone.

    Attributes:
        config: with ``top_l`` as a count.
        report: how well it fits, on the calibration batch.
        attention: the sparse layers, by the attention module's name.
        feed_forwards: what was replaced, and by what.
    """

    config: SptConfig
    report: SptReport = field(default_factory=SptReport)
    attention: dict[str, SparseAttention] = field(default_factory=dict)
    feed_forwards: list[tuple[FeedForward, RoutedFeedForward]] = field(default_factory=list)
    context: ForwardContext = field(default_factory=ForwardContext)
    attention_before: str | None = None
    refresh: CodebookRefresh | None = None
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
    """
    check_bare("sparsify", model)
    if not isinstance(config, SptConfig):
        raise TypeError(f"sparsify got a {type(config).__name__} as its config; expected an SptConfig.")
    if sparsification(model) is not None:
        raise ValueError("The model is sparse already; call desparsify first to convert it with other settings.")
    batch = None if calibration_data is None else _checked(model, calibration_data)
    if config.attention:
        if batch is None:
            raise ValueError("Sparse attention needs calibration_data for its codebooks; pass a batch of input ids.")
        config = config.with_length(_length(batch))
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
        calls = _attend_densely(model, config, batch) if batch is not None else {}
    starts = [_start(feed_forward, config, batch, seen) for feed_forward in feed_forwards]
    codebooks = {name: _codebooks(name, call, config) for name, call in calls.items()}

    done = install(model, config, codebooks, list(zip(feed_forwards, starts, strict=True)))
    for name, layer in done.attention.items():
        report_attention(done.report, name, layer, calls[name])
    if batch is not None:
        report_feed_forwards(done.report, done.feed_forwards, seen, config)
    return model


def check_bare(caller: str, model: Any) -> None:
    """Refuse what is no transformers model, or is wrapped by PEFT.

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
    feed_forwards: list[tuple[FeedForward, Start]],
) -> Sparsification:
    """Put sparse attention and routed FFNs into a model: what is left once it is known what they are."""
    done = Sparsification(config)
    for name, books in codebooks.items():
        module: Any = model.get_submodule(name)
        module.spt = done.attention[name] = SparseAttention(books, config, done.context)
    if codebooks:
        done.attention_before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        if config.codebook_interval:
            done.refresh = CodebookRefresh(model, list(done.attention.values()), config.codebook_interval)
    for feed_forward, start in feed_forwards:
        done.feed_forwards.append((feed_forward, _install(model, feed_forward, start, done)))
    done.context.watch(model)
    done.loading = save_densely(model, done.feed_forwards)
    model.spt_settings = SparseSettings(model, done.feed_forwards, Settings(config), done.context)
    setattr(model, _ATTRIBUTE, done)
    return done


def desparsify(model: PreTrainedModel) -> PreTrainedModel:
    """Make a sparse model dense again, in place: the weights are those from before, bit for bit, or as trained since.

    Raises:
        ValueError: the model is not sparse, or is still wrapped by PEFT.
    """
    if isinstance(model, PeftModel):
        raise ValueError("desparsify got a PeftModel; call its merge_and_unload or unload first.")
    done = sparsification(model)
    if done is None:
        raise ValueError("The model is not sparse, so there is nothing to undo.")
    done.context.unwatch()
    settings: Any = model.spt_settings
    settings.detach()
    del model.save_pretrained
    if done.loading is not None:
        done.loading.remove()
    del model.spt_settings
    for feed_forward, routed in done.feed_forwards:
        _uninstall(model, feed_forward, routed)
    for name in done.attention:
        del model.get_submodule(name).spt
    if done.attention_before is not None:
        model.set_attn_implementation(done.attention_before)
    delattr(model, _ATTRIBUTE)
    return model


def _checked(model: PreTrainedModel, data: Any) -> dict[str, Tensor]:
    """The calibration batch as keyword arguments on the model's device."""
    if not isinstance(data, (Mapping, Tensor, str, list, tuple, np.ndarray)):
        raise ValueError(
            f"calibration_data is {data!r:.80} ({type(data).__name__}); expected token ids (B, T), as a tensor or "
            "lists, or the mapping that the model takes."
        )
    batch = data if isinstance(data, Mapping) else {"input_ids": data}
    batch = {
        name: _ids(value) if isinstance(value, (str, list, tuple, np.ndarray)) else value
        for name, value in batch.items()
        if name != "labels"
    }
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if all(value.dim() == 1 for value in tensors.values()):  # one sequence
        tensors = {name: value[None] for name, value in tensors.items()}
    if not tensors or any(value.numel() == 0 for value in tensors.values()):
        raise ValueError("calibration_data is empty; pass at least one sequence, for example input ids (B, T).")
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"calibration_data has NaN or infinite values in {name}; pass clean data.")
        if value.dim() < 2:
            raise ValueError(f"calibration_data has {name} of shape {tuple(value.shape)}; expected (B, T, ...).")
        if name.endswith("input_ids"):
            _check_ids(name, value, model)
        if name.endswith("attention_mask") and value.dim() == 2 and not value.any():
            raise ValueError(
                f"calibration_data has 0 everywhere in {name}, as if all tokens were padding; pass the tokenizer's."
            )
    return {name: value.to(model.device) for name, value in tensors.items()}


def _check_ids(name: str, ids: Tensor, model: PreTrainedModel) -> None:
    """Refuse what the model has no embeddings for; on an accelerator that would end the process's use of it."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"calibration_data has {name} of shape {tuple(ids.shape)} and {ids.dtype}; expected whole numbers (B, T)."
        )
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if name == "input_ids" and size is not None and not 0 <= (worst := _farthest(ids)) < size:
        raise ValueError(
            f"calibration_data has the token id {worst}, but {type(model).__name__} knows 0 to {size - 1}; pass what "
            "its own tokenizer gives."
        )


def _farthest(ids: Tensor) -> int:
    """The id that is below 0, or else the largest."""
    least, most = (int(bound) for bound in ids.aminmax())
    return least if least < 0 else most


def _ids(data: Any) -> Tensor:
    """Lists of token ids as a tensor (B, T), or (T,) from a single list."""
    if isinstance(data, str) or (len(data) and isinstance(data[0], str)):
        raise ValueError(
            "calibration_data holds texts, but a model is run on token ids; pass "
            "tokenizer(texts, padding=True, return_tensors='pt')."
        )
    rows = [row for row in data if isinstance(row, (list, tuple, np.ndarray, Tensor))]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"calibration_data has sequences of {lengths[0]} to {lengths[-1]} token ids; pad or cut them to one length."
        )
    try:
        return torch.stack([torch.as_tensor(row) for row in data]) if rows else torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"calibration_data is {data!r:.80}; expected token ids (B, T).") from error


def _length(batch: dict[str, Tensor]) -> int:
    return next(iter(batch.values())).shape[1]


@torch.no_grad()
def _attend_densely(model: PreTrainedModel, config: SptConfig, batch: dict[str, Tensor]) -> dict[str, AttentionCall]:
    """A pass of the dense model; what each self-attention that is to become sparse attended with, by its name."""
    before, training = model.config._attn_implementation, model.training
    if config.attention:
        model.set_attn_implementation(NAME)
    model.eval()
    try:
        with recording() as calls:
            model(**batch)
    except (IndexError, TypeError, RuntimeError) as error:  # such as more positions than the model has
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be run on calibration_data ({first_line(error)}); pass a batch as in "
            "training."
        ) from error
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    if not config.attention:
        return {}
    names = {module: name for name, module in model.named_modules()}
    found = {names[module]: call for module, call in calls.items() if _is_self_attention(module, names[module])}
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its attention "
            "cannot be made sparse; convert it with SptConfig(attention=False)."
        )
    return _chosen(model, found, config)


def _is_self_attention(module: nn.Module, name: str) -> bool:
    words = f"{type(module).__name__}.{name}".lower()
    return not (getattr(module, "is_cross_attention", False) or "cross" in words or "encoder_attn" in words)


def _chosen(model: PreTrainedModel, calls: dict[str, AttentionCall], config: SptConfig) -> dict[str, AttentionCall]:
    """Those in the layers that are to be transformed."""
    if config.layers_to_transform is None:
        return calls
    layers = tuple(f"{block.name}." for block in find_blocks(model, layers_to_transform=config.layers_to_transform))
    return {name: call for name, call in calls.items() if name.startswith(layers)}


def _codebooks(name: str, call: AttentionCall, config: SptConfig) -> Tensor:
    size = call.query.shape[-1]
    if size % config.subvector_dim:
        raise ValueError(
            f"{name} has heads of {size} channels, which subvector_dim={config.subvector_dim} does not divide; choose "
            "a divisor."
        )
    vectors = vectors_of(call.query, call.key, call.mask)
    if not vectors.isfinite().all():
        raise ValueError(
            f"Queries or keys of {name} are NaN or infinite on the calibration data; check data, weights and dtype."
        )
    return fit_codebooks(
        vectors, subvector_dim=config.subvector_dim, num_codewords=config.num_codewords, seed=config.seed
    )


def _start(
    feed_forward: FeedForward,
    config: SptConfig,
    batch: dict[str, Tensor] | None,
    seen: dict[str, tuple[Tensor, Tensor]],
) -> Start:
    """How the neurons are cut into blocks, and where the router starts: from a calibration batch where there is one."""
    inner, num_blocks = feed_forward.sizes[1], config.num_blocks
    inputs = None if batch is None else _inputs(feed_forward, batch, seen)
    states = None if inputs is None else inner_states(feed_forward, inputs)
    if config.block_assignment == "contiguous":
        order = torch.arange(inner, device=deciding_weight(feed_forward).device)
    else:
        features = deciding_weight(feed_forward) if states is None else activity(feed_forward, states, config.seed)
        order = clustered_order(features, num_blocks, config.seed)
    if inputs is None or states is None:
        return start_from_weights(feed_forward, order, num_blocks)
    start = start_from_outputs(feed_forward, order, num_blocks, inputs, states)
    if not config.compensation_rank or config.num_active_blocks == num_blocks:
        return start
    return compensated(feed_forward, start, int(config.num_active_blocks), config.compensation_rank, inputs, states)


def _inputs(feed_forward: FeedForward, batch: dict[str, Tensor], seen: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """What went into an FFN, without padding: (N, D)."""
    inputs = seen[feed_forward.name][0].flatten(0, -2)
    mask = batch.get("decoder_attention_mask" if feed_forward.is_decoder else "attention_mask")
    return inputs[mask.flatten().bool()] if mask is not None and mask.numel() == len(inputs) else inputs


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


def _install(model: nn.Module, feed_forward: FeedForward, start: Start, done: Sparsification) -> RoutedFeedForward:
    routed = RoutedFeedForward(feed_forward, start, done.config, done.context)
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
    """Put a module or a function where a module or a function is."""
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
    """In place of a projection whose work the routed FFN does: no module, so that LoRA does not take it for one."""
    return hidden_states
