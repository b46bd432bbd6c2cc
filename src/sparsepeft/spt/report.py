"""What making a model sparse costs and saves, on the calibration batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsepeft.models.masks import dense_mask
from sparsepeft.models.modes import in_mode
from sparsepeft.models.sublayers import FeedForward
from sparsepeft.ops.sparse_attention import selection_recall
from sparsepeft.spt.attention import AttentionCall, SparseAttention
from sparsepeft.spt.feed_forward import RoutedFeedForward, SparseFeedForward

_TOKENS = 4096  # of sequences that attention is reported on, at most, but for a single longer one


@dataclass
class SptReport:
    """Layer by layer, each with the inputs it has in the dense model.

    Attributes:
        recall: share of the L keys with the highest scores that are among those kept, by the attention's name.
        attention_error: norm of the output's change over the norm of the output.
        feed_forward_error: the same for FFNs; 0 for those with exact values.
        feed_forward_operations: multiply-adds of the sparse FFNs, with routers, compensation and updates, over those of
            the dense ones.
        feed_forward_step_operations: the same of a training step, forward and backward, in which the FFNs' weights are
            frozen.
    """

    recall: dict[str, float] = field(default_factory=dict)
    attention_error: dict[str, float] = field(default_factory=dict)
    feed_forward_error: dict[str, float] = field(default_factory=dict)
    feed_forward_operations: float | None = None
    feed_forward_step_operations: float | None = None

    def __repr__(self) -> str:
        """Means over the layers."""
        named = {"recall": self.recall, "attention error": self.attention_error, "FFN error": self.feed_forward_error}
        means = [f"{name} {sum(by.values()) / len(by):.3f}" for name, by in named.items() if by]
        if self.feed_forward_operations is not None:
            means.append(f"{self.feed_forward_operations:.3f} of the FFNs' operations")
        if self.feed_forward_step_operations is not None:
            means.append(f"{self.feed_forward_step_operations:.3f} in a training step")
        num_layers = max(len(self.recall), len(self.feed_forward_error))
        return f"SptReport({', '.join([f'{num_layers} layers', *means])})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dict(vars(self))


@contextmanager
def watching(feed_forwards: list[FeedForward]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside the context, the input and output of each FFN are recorded, by its name."""
    seen: dict[str, Any] = {}

    def note_input(name: str, module: nn.Module, args: tuple) -> None:
        seen[name] = args[0].detach()

    def note_output(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[name] = (seen[name], output.detach())

    handles = []
    for each in feed_forwards:
        handles.append(each.part(each.names.up).register_forward_pre_hook(partial(note_input, each.name)))
        handles.append(each.part(each.names.down).register_forward_hook(partial(note_output, each.name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def report_attention(report: SptReport, name: str, layer: SparseAttention, call: AttentionCall) -> None:
    """Add one attention layer, on the first sequences of the batch alone where these are long: it is (B, H, T, T)."""
    num_rows = max(1, _TOKENS // call.query.shape[2])
    query, key, value, mask = call.first(num_rows)
    scale = query.shape[-1] ** -0.5
    report.recall[name] = selection_recall(query, key, **layer.state.current.choice(), **layer.selection(mask))
    dense = scaled_dot_product_attention(query, key, value, dense_mask(mask), scale=scale, enable_gqa=True)
    real = mask.key_mask[:, None, mask.query_positions, None]  # padding does not count
    report.attention_error[name] = _relative(layer(query, key, value, mask, scale) * real, dense.nan_to_num() * real)


@torch.no_grad()
def report_feed_forwards(
    report: SptReport,
    sparse: list[tuple[FeedForward, SparseFeedForward]],
    seen: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Add all FFNs."""
    dense = forward = backward = 0.0
    for feed_forward, layer in sparse:
        inputs, expected = seen[feed_forward.name]
        with in_mode(layer, training=False):
            report.feed_forward_error[feed_forward.name] = _relative(layer(inputs), expected)
        hidden, inner = feed_forward.sizes
        products = (2 if feed_forward.names.gate is None else 3) * hidden * inner
        chosen = products * int(layer.config.num_active_blocks) / layer.config.num_blocks
        dense += products
        added = _added_operations(layer) if isinstance(layer, RoutedFeedForward) else 0
        forward += (chosen if isinstance(layer, RoutedFeedForward) else products) + added
        backward += chosen + 2 * added  # of its weights, which train, and of its input
    if dense:
        report.feed_forward_operations = forward / dense
        report.feed_forward_step_operations = (forward + backward) / (2 * dense)


def _added_operations(layer: RoutedFeedForward) -> int:
    """Multiply-adds for a token of what a routed FFN has beside the dense FFN's weights."""
    router = layer.spt_router.original_module
    (num_blocks, hidden), inner = router.weight.shape, len(router.neuron_order)
    active = inner * int(layer.config.num_active_blocks) // num_blocks
    compensation = router.compensation
    added = 0 if compensation is None else compensation.down.numel() + compensation.up.numel()
    return hidden * num_blocks + added + sum(len(update.down) * (hidden + active) for update in router.updates.values())


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
