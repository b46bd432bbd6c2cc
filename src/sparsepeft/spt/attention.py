"""Sparse attention inside transformers' models, through their attention interface."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from sparsepeft.models.masks import SparseMask, dense_mask, is_whole, read_mask, sparse_mask
from sparsepeft.ops.sparse_attention import sparse_attention
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.density import SparseContext
from sparsepeft.spt.state import SptState

logger = logging.get_logger(__name__)

NAME = "spt"  # as transformers knows it


class AttentionCall(NamedTuple):
    """What a layer attended with, recorded for calibration."""

    query: Tensor  # (B, H, Tq, D), as scaled by :func:`_standard_scale`
    key: Tensor  # (B, Hkv, Tk, D)
    value: Tensor
    mask: SparseMask

    def first(self, num_rows: int) -> AttentionCall:
        """Of the first sequences alone."""
        query, key, value = (tensor[:num_rows] for tensor in self[:3])
        return AttentionCall(query, key, value, self.mask._replace(key_mask=self.mask.key_mask[:num_rows]))


class SparseAttention(nn.Module):
    """The state of a sparse attention layer: its settings, and codebooks, of which every adapter has its own.

    Args:
        codebooks: by which keys are chosen.
        config: with ``top_l`` as a count.
        context: of the sparse model.

    Attributes:
        dense: attend as the dense model, whatever the settings say; may be switched at any time.
    """

    def __init__(self, codebooks: Codebooks, config: SptConfig, context: SparseContext | None = None) -> None:
        super().__init__()
        self.context = context or SparseContext(config)
        self.state = SptState(codebooks, self.context)
        self.config = config
        self.dense = False

    @property
    def is_dense(self) -> bool:
        """Whether it attends as the dense model now."""
        return self.dense or self.context.is_dense(self.training)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: SparseMask, scale: float) -> Tensor:
        """(B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv) -> (B, H, Tq, Dv)."""
        query, scale = _standard_scale(query, scale)
        query, key, value = _of_one_dtype(query, key, value)

        def attend(codebooks: Codebooks, _: Any, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
            row_mask = mask._replace(key_mask=key_mask)
            if self._refreshes(codebooks):
                codebooks.prepare(query, key, row_mask, self.config)

            def attend_to_chosen(query: Tensor, key: Tensor, value: Tensor, mask: SparseMask) -> Tensor:
                chosen_by = codebooks.choice() | self.selection(mask)
                return sparse_attention(query, key, value, scale=scale, **chosen_by)

            if self.config.granularity == "token" or key_mask[:, 0].all():
                return attend_to_chosen(query, key, value, row_mask)
            return _with_padding_behind(attend_to_chosen, query, key, value, row_mask)

        attended = self.state.by_row(attend, query, key, value, mask.key_mask)
        positions = self.context.positions_for(attended[:, 0], is_decoder=mask.causal) if self.training else None
        return attended if positions is None else _densely_at(positions, attended, query, key, value, mask, scale)

    def note(self, query: Tensor, key: Tensor, mask: SparseMask, scale: float) -> None:
        """What a pass that attends densely does for the codebooks."""
        codebooks = self.state.current
        if self._refreshes(codebooks):
            query, key = _of_one_dtype(_standard_scale(query, scale)[0], key)
            codebooks.prepare(query, key, mask, self.config)

    def _refreshes(self, codebooks: Codebooks) -> bool:
        return self.training and codebooks.expected and self.config.codebook_interval > 0

    def selection(self, mask: SparseMask) -> dict[str, Any]:
        """Which keys a query may see and which it keeps, as the op's arguments."""
        config = self.config
        return {
            "top_l": int(config.top_l),
            "causal": mask.causal,
            "key_mask": mask.key_mask,
            "query_positions": mask.query_positions,
            "window": mask.window,
            "keep_self": config.keep_self,
            "keep_first": config.keep_first,
            "similarity": config.similarity,
            "granularity": config.granularity,
            **({"block_size": config.block_size} if config.granularity == "block" else {}),
        }


def _with_padding_behind(
    attend: Callable[[Tensor, Tensor, Tensor, SparseMask], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SparseMask,
) -> Tensor:
    """``attend``, with padding on the left put on the right: blocks are cut from a row's first real key.

    So a text's blocks do not depend on how long the texts beside it are.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    first = mask.key_mask.int().argmax(1, keepdim=True)  # (B, 1)
    num_before = (mask.query_positions < first).sum(1, keepdim=True)
    index = torch.arange(max(num_queries, num_keys), device=query.device)
    queries, keys = (index[:num_queries] + num_before) % num_queries, (index[:num_keys] + first) % num_keys
    moved = SparseMask(
        mask.key_mask.gather(1, keys),
        (mask.query_positions[queries] - first) % num_keys,  # (B, Tq)
        mask.causal,
        mask.window,
    )
    query, key, value = (
        each.take_along_dim(order[:, None, :, None], 2)
        for each, order in ((query, queries), (key, keys), (value, keys))
    )
    back = (index[:num_queries] - num_before) % num_queries
    return attend(query, key, value, moved).take_along_dim(back[:, None, :, None], 2)


def _densely_at(
    positions: Tensor, attended: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: SparseMask, scale: float
) -> Tensor:
    """``attended`` (B, H, Tq, Dv), with the queries at ``positions`` (B, Tq) attending to all keys they may see."""
    most = int(positions.sum(1).max())
    if not most:
        return attended
    order = torch.argsort(positions.logical_not().int(), dim=1, stable=True)[:, :most]
    is_one = positions.gather(1, order)  # else it fills up the rows that have fewer
    queries = query.gather(2, order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    allowed = dense_mask(mask._replace(query_positions=mask.query_positions[order])) | ~is_one[:, None, :, None]
    dense = scaled_dot_product_attention(queries, key, value, allowed, scale=scale, enable_gqa=True).transpose(1, 2)
    return attended.transpose(1, 2).masked_scatter(positions[..., None, None], dense[is_one]).transpose(1, 2)


def _standard_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The query as if scores were divided by sqrt(D) later: some models (OPT) have scaled it already.

    Codebooks that queries and keys share would not fit a query of another length.
    """
    standard = query.shape[-1] ** -0.5
    return (query, scale) if math.isclose(scale, standard, rel_tol=1e-3) else (query * (scale / standard), standard)


def _of_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Autocast's dtype where that is on: rotary embeddings leave queries and keys in float32. Else the common one."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


_recorder: ContextVar[dict[nn.Module, AttentionCall] | None] = ContextVar("spt_recorder", default=None)


@contextmanager
def recording() -> Iterator[dict[nn.Module, AttentionCall]]:
    """Inside the context, layers attend densely, and the arguments of the last call of each are recorded."""
    calls: dict[nn.Module, AttentionCall] = {}
    token = _recorder.set(calls)
    try:
        yield calls
    finally:
        _recorder.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query (B, H, Tq, D), key and value (B, Hkv, Tk, D) -> (B, Tq, H, D).

    A module without :class:`SparseAttention` (cross-attention, a layer left out, a tower that makes no mask) attends
    densely.

    Raises:
        ValueError: the mask is not the one that belongs to it, or the layer adds something to its scores.
    """
    sparse: SparseAttention | None = getattr(module, "spt", None)
    if sparse is None and (attention_mask is None or attention_mask.dtype != torch.int32):
        given = {"dropout": dropout, "scaling": scaling} | kwargs
        attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return attended
    mask = read_mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    calls = _recorder.get()
    if sparse is not None or calls is not None:
        refuse_additions(module, kwargs)
    if calls is not None:
        calls[module] = AttentionCall(_standard_scale(query, scale)[0].detach(), key.detach(), value.detach(), mask)
    if sparse is None or calls is not None or sparse.is_dense:
        if sparse is not None and calls is None:
            sparse.note(query, key, mask, scale)
        whole = is_whole(mask)
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            None if whole else dense_mask(mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=whole and mask.causal,
            **kwargs,
        )
        return output
    if dropout > 0:
        logger.warning_once("Sparse attention has no dropout of attention weights; the model's is left out.")
    return sparse(query, key, value, mask, scale).transpose(1, 2).contiguous(), None


def refuse_additions(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise if a layer adds biases, sinks or a cap to its scores, which the selection of keys would ignore."""
    for name in ("position_bias", "s_aux", "softcap", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}, which sparse attention leaves out; convert this model "
                "with SptConfig(attention=False)."
            )


Implementations = list[tuple[Any, str | None]]  # the attention that each config names


def implementations(model: nn.Module, around: Iterable[str] | None = None) -> Implementations:
    """Of all configs in a model, or of those that modules of some names, or the models around these, have."""
    configs: dict[int, Any] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_meant = around is None or any(f".{each}.".startswith(f".{name}." if name else ".") for each in around)
        if isinstance(config, PreTrainedConfig) and is_meant:
            configs[id(config)] = config
    return [(config, config._attn_implementation) for config in configs.values()]


def set_implementations(given: Implementations) -> None:
    """Let each config name its attention, and leave those inside it alone."""
    for config, implementation in given:
        config._attn_implementation_internal = implementation


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sparse_mask)


class CodebookRefresh:
    """Recomputes codebooks after every ``interval`` optimizer steps.

    The pass after such a step computes new codebooks, and the next step puts them into use: never within a step, in
    which gradient checkpointing may run layers twice.

    Args:
        layers: the sparse attention of a model.
        interval: steps between two refreshes.
    """

    def __init__(self, layers: list[SparseAttention], interval: int) -> None:
        self._layers, self._interval = layers, interval

    def after_step(self, before: int) -> None:
        """An optimizer step was done after ``before`` others."""
        for layer in self._layers:
            codebooks = layer.state.current
            codebooks.step(is_due=before > 0 and before % self._interval == 0)
            codebooks.expected = (before + 1) % self._interval == 0
