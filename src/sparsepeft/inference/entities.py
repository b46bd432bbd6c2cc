"""From the logits of a text's tokens to entities, as transformers' pipeline for token classification finds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.pipelines.token_classification import AggregationStrategy, TokenClassificationPipeline

from sparsepeft.inference.encoding import Encoded
from sparsepeft.inference.portable import Entity, InputError, entities_in, without_overlap

Strategy = Literal["none", "simple", "first", "average", "max"]


class EntityOptions(NamedTuple):
    """How tokens are put together, by the names of transformers' pipeline.

    Attributes:
        aggregation_strategy: ``"none"`` leaves each token by itself; ``"simple"`` joins neighbours of one label;
            ``"first"``, ``"average"`` and ``"max"`` also keep the tokens of a word together. None is
            ``"simple"``, and for runs of ``sparsepeft train``, where the first token of a word was trained to speak for
            it, :func:`sparsepeft.inference.portable.entities_in` by word.
        ignore_labels: labels whose tokens or groups are left out.
        stride: how many tokens neighbouring parts of a text share that is longer than its task takes; None cuts it.
    """

    aggregation_strategy: Strategy | None = None
    ignore_labels: tuple[str, ...] = ("O",)
    stride: int | None = None


def entity_options(aggregation_strategy: Any, ignore_labels: Any, stride: Any = None) -> EntityOptions:
    """The options, checked.

    Raises:
        InputError: one has a value that it cannot have, or they do not go together.
    """
    if aggregation_strategy is not None and aggregation_strategy not in get_args(Strategy):
        raise InputError(
            f"`aggregation_strategy={aggregation_strategy!r}` was given; pass {', '.join(get_args(Strategy))}."
        )
    is_several = isinstance(ignore_labels, Iterable) and not isinstance(ignore_labels, (str, bytes))
    names = tuple(ignore_labels) if is_several else (None,)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"`ignore_labels={ignore_labels!r:.80}` was given; pass a list of labels, such as ['O'].")
    if stride is not None and (not isinstance(stride, int) or isinstance(stride, bool) or stride < 0):
        raise InputError(f"`stride={stride!r}` was given; pass a whole number of tokens, 0 or more.")
    return EntityOptions(aggregation_strategy, names, stride)


class _LastStep(TokenClassificationPipeline):
    """The pipeline's last step, for logits that are there already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str]) -> None:
        # Past the pipeline's own constructor, which wants a model to run.
        self.tokenizer: Any = tokenizer
        self.model: Any = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(label_names))))


def find_entities(
    parts: Sequence[tuple[Encoded, np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    options: EntityOptions,
    *,
    by_word: bool = False,
) -> tuple[Entity, ...]:
    """The entities of a text, in its order.

    Args:
        parts: of the text, encoded with spans; one, or several that overlap; with logits (T, num_labels) of each.
        tokenizer: that encoded them.
        label_names: by index.
        options: see :class:`EntityOptions`.
        by_word: the task is a run's, where the first token of a word was trained to speak for it.
    """
    text, strategy = parts[0][0].spans.text, options.aggregation_strategy
    if strategy == "none" or (by_word and strategy is None):
        pieces = [(one.spans.offsets, one.spans.special_tokens_mask, logits) for one, logits in parts]
        offsets, known = without_overlap(pieces, options.stride or 0)
        joined, ignored = strategy is None, options.ignore_labels
        found = entities_in(text, offsets, known, label_names, by_word=joined, joined=joined, ignore_labels=ignored)
        return tuple(entity for entity in found if joined or entity.label not in ignored)
    outputs = [
        {
            "sentence": text,
            "logits": torch.from_numpy(logits)[None],
            "input_ids": [encoded.features["input_ids"]],
            "offset_mapping": [encoded.spans.offsets],
            "special_tokens_mask": torch.tensor([encoded.spans.special_tokens_mask]),
        }
        for encoded, logits in parts
    ]
    last_step = _LastStep(tokenizer, label_names)
    groups = last_step.postprocess(outputs, AggregationStrategy(strategy or "simple"), list(options.ignore_labels))
    return tuple(
        Entity(
            label=group["entity_group"],
            score=float(group["score"]),
            word=text[group["start"] : group["end"]],
            start=group["start"],
            end=group["end"],
        )
        for group in groups
    )
