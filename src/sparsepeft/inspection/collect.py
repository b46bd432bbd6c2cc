"""Running a model over texts and watching its memories, without changing what it answers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel, TaskType
from torch import nn

from sparsepeft.errors import UserError
from sparsepeft.inspection.labels import BatchLabels
from sparsepeft.inspection.picks import Picks
from sparsepeft.inspection.report import MAX_LISTED, MemoryReport, layer_report
from sparsepeft.inspection.words import WordCounts, Words
from sparsepeft.layers import SparseMemory
from sparsepeft.tuners.spartan import SpartanLayer

_MASK_IGNORED = "The attention mask does not count the states of {}, so all of its positions were counted."
_MANY_PARENTS = (
    "The memories have {:,} parents; the {:,} of each that were picked most are listed, and no words were counted."
)
_FORGOTTEN = "There were too many different words to keep; the rarest were forgotten along the way."


@dataclass(frozen=True)
class MemoryOfLayer:
    """A memory of the active adapter and where it stands.

    Attributes:
        index: the layer's position in its stack.
        name: the layer's dotted name in the bare model.
        layer: the wrapped layer.
        memory: what follows it.
    """

    index: int
    name: str
    layer: SpartanLayer
    memory: SparseMemory


def find_memories(model: nn.Module, layer: int | None = None) -> list[MemoryOfLayer]:
    """The memories of a model's active adapter, in the model's order.

    Args:
        model: a ``PeftModel``.
        layer: only those of this layer, by its position in its stack (an encoder-decoder has two such layers).

    Raises:
        UserError: the active adapter has no SPARTAN memory, or none after ``layer``.
    """
    if not isinstance(model, PeftModel):
        raise UserError(
            f"{type(model).__name__} is no PeftModel, so it has no SPARTAN memory to inspect; pass a model from "
            "get_peft_model or PeftModel.from_pretrained, or the folder of a run with the method spartan."
        )
    memories = memories_of(model.get_base_model(), model.active_adapter)
    if not memories:
        kind = getattr(model.peft_config[model.active_adapter].peft_type, "value", "unknown")
        raise UserError(
            f"The adapter {model.active_adapter!r} is of the method {kind} and has no SPARTAN memory to inspect; pass "
            "an adapter or a run that was trained with the method spartan."
        )
    if layer is None:
        return memories
    chosen = [memory for memory in memories if memory.index == layer]
    if not chosen:
        numbers = sorted({memory.index for memory in memories})
        raise UserError(
            f"`layer={layer}` was given, but that layer has no memory; choose one of {', '.join(map(str, numbers))} "
            "(layers count from 0)."
        )
    return chosen


def memories_of(model: nn.Module, *adapter_names: str) -> list[MemoryOfLayer]:
    """The memories of an adapter in a bare model, in the model's order; of several names each layer's first."""
    memories: list[MemoryOfLayer] = []
    for name, module in model.named_modules():
        own = [each for each in adapter_names if isinstance(module, SpartanLayer) and each in module.spartan_memory]
        if own:
            layer: Any = module
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            number = numbers[-1] if numbers else len(memories)
            memories.append(MemoryOfLayer(number, name, layer, layer.spartan_memory[own[0]]))
    return memories


def inspect_memories(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    label_names: Sequence[str] | None = None,
    label_edges: Sequence[float] | None = None,
    layer: int | None = None,
    compare_untrained: bool = False,
    seed: int = 42,
    num_words: int = 10,
    min_word_count: int = 5,
    keep_stop_words: bool = False,
) -> MemoryReport:
    """What each parent cell of a model's SPARTAN memories is picked for.

    The model's answers, mode, adapters and the global random state are left as they were.

    Args:
        model: a ``PeftModel``; its active adapter is inspected.
        batches: what the model takes, (B, T) tensors by name; besides ``"labels"``, which it is not given, ``"words"``,
            a :class:`Words` (see :func:`encode_with_words` and :func:`token_words`), and ``"documents"``, an array (B,)
            of which document of the batch, counted from 0, a row is a part; all optional.
            Positions whose ``attention_mask`` is 0 never count. Read once, or twice with ``compare_untrained``.
        label_names: names of the labels; None takes the model's.
        label_edges: borders of bins, where labels are values; see :func:`quantile_edges`.
        layer: only this layer, by its position in its stack.
        compare_untrained: also inspect a fresh memory with the same config on the same backbone.
        seed: of that fresh memory.
        num_words, min_word_count: how many words to list for a parent, and how often each must have met it.
        keep_stop_words: also list English function words, words that most texts have, and punctuation.

    Returns:
        The report; memory use does not grow with the number of batches.

    Raises:
        UserError: no memory, unknown layer, nothing to count, labels without a name, values without edges.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer
        >>> from sparsepeft import SpartanConfig
        >>> from sparsepeft.inspection import encode_with_words
        >>> tokenizer = AutoTokenizer.from_pretrained("FacebookAI/roberta-base")
        >>> model = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base", num_labels=2)
        >>> model = get_peft_model(model, SpartanConfig(task_type="SEQ_CLS"))
        >>> batch = encode_with_words(tokenizer, ["Shares fell again.", "A late goal won the cup."])
        >>> report = inspect_memories(model, [batch | {"labels": torch.tensor([0, 1])}])
        >>> 0 <= report.layers[-1].nmi_documents <= 1
        True
    """
    find_memories(model, layer)
    assert isinstance(model, PeftModel)  # find_memories has looked
    if compare_untrained and iter(batches) is batches:
        raise UserError(
            "`compare_untrained=True` reads the batches twice, but an iterator was given; pass a list or loader."
        )
    listing = (num_words, min_word_count, keep_stop_words)
    config: Any = model.peft_config[model.active_adapter]
    id2label = getattr(model.get_base_model().config, "id2label", None) or {}
    names = [str(id2label[index]) for index in sorted(id2label)] if label_names is None else label_names
    per_position = label_names is not None or config.task_type == TaskType.TOKEN_CLS

    def inspect() -> MemoryReport:
        labels = BatchLabels(names, label_edges, per_position)
        return _Watch(model, find_memories(model, layer), labels).run(batches, listing)

    report = inspect()
    if not compare_untrained:
        return report
    with untrained_adapter(model, seed):
        return dataclasses.replace(report, untrained=inspect())


class _Watch:
    """Counts of all memories during one run over the batches."""

    def __init__(self, model: PeftModel, memories: list[MemoryOfLayer], labels: BatchLabels) -> None:
        self.model, self.memories, self.labels = model, memories, labels
        self.picks = [Picks(found.memory, len(labels.names)) for found in memories]
        self.notes: dict[str, None] = {}  # ordered, each once
        num_parents = memories[0].memory.num_parents
        self.words = WordCounts(len(memories), num_parents) if num_parents <= MAX_LISTED else None
        if self.words is None:
            self.notes[_MANY_PARENTS.format(num_parents, MAX_LISTED)] = None
        self._batch: dict[str, Any] = {}
        self._classes: np.ndarray = np.zeros(0, dtype=np.int64)
        self._position_classes: np.ndarray | None = None

    def run(self, batches: Iterable[Mapping[str, Any]], listing: tuple[int, int, bool]) -> MemoryReport:
        with ExitStack() as hooks, _eval_mode(self.model), torch.inference_mode():
            for i, found in enumerate(self.memories):
                hooks.callback(found.memory.register_forward_pre_hook(partial(self._look, i)).remove)
            for batch in batches:
                self._run_batch(dict(batch))
        if not self.picks[0].positions:
            raise UserError("There is nothing to count: the batches hold no positions; pass at least one text.")
        if self.words is not None and self.words.has_forgotten:
            self.notes[_FORGOTTEN] = None
        if self.labels.note:
            self.notes[self.labels.note] = None
        layers = []
        for i, (found, picks) in enumerate(zip(self.memories, self.picks, strict=True)):
            parents = range(len(picks.first))
            words = [[] if self.words is None else self.words.top(i, parent, *listing) for parent in parents]
            layers.append(layer_report(found.index, found.name, picks, self.labels.names, words))
        return MemoryReport(
            adapter=str(self.model.active_adapter),
            label_names=self.labels.names if self.labels.unit is not None else None,
            layers=layers,
            notes=tuple(self.notes),
        )

    def _run_batch(self, batch: dict[str, Any]) -> None:
        labels = batch.pop("labels", None)
        device = self.model.device
        others = ("words", "documents")
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k not in others}
        if labels is not None and _makes_decoder_inputs(self.model, inputs, labels):
            inputs["labels"] = labels.to(device)
            batch["decoder_attention_mask"] = labels != -100
        self._batch = batch
        self._classes, self._position_classes = self.labels.read(labels)
        self.model(**inputs)
        classes = self._classes
        if len(classes) and "documents" in batch:  # a document's label is that of its first part
            classes = classes[np.unique(batch["documents"], return_index=True)[1]]
        for picks in self.picks:
            picks.finish_batch(classes)
        if self.words is not None:
            self.words.shrink()

    def _look(self, i: int, memory: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook of memory ``i``: count, and leave its arguments alone."""
        layer, picks = self.memories[i].layer, self.picks[i]
        states = args[0].transpose(0, layer.batch_dim)
        states = states.flatten(1, -2) if states.dim() > 2 else states.unsqueeze(1)  # (B, T, D)
        num_rows, length = states.shape[:2]
        positions = self._mask(i, num_rows, length).flatten().nonzero()[:, 0]
        flat = positions.cpu().numpy()
        rows = flat // length
        classes = self._position_classes
        if classes is not None and classes.shape == (num_rows, length):
            classes = classes.reshape(-1)[flat]
        elif len(self._classes) == num_rows:
            classes = self._classes[rows]
        else:
            classes = np.full(len(rows), -1)
        documents = self._batch.get("documents")
        if documents is not None and len(documents) == num_rows:
            rows, num_rows = np.asarray(documents)[rows], int(max(documents)) + 1
        first = picks.add(states.reshape(-1, states.shape[-1])[positions.to(states.device)], rows, num_rows, classes)
        words: Words | None = self._batch.get("words")
        if words is None or self.words is None:
            return
        if not layer.is_decoder and words.occurrence.shape == (len(states), length):
            self.words.add(i, words, flat, first)

    def _mask(self, i: int, num_rows: int, length: int) -> torch.Tensor:
        """Which positions count, (B, T)."""
        mask = self._batch.get("decoder_attention_mask" if self.memories[i].layer.is_decoder else "attention_mask")
        if mask is not None and tuple(mask.shape) == (num_rows, length):
            return torch.as_tensor(mask).bool()
        if mask is not None:
            self.notes[_MASK_IGNORED.format(self.memories[i].name)] = None
        return torch.ones(num_rows, length, dtype=torch.bool)


def _makes_decoder_inputs(model: PeftModel, inputs: Mapping[str, Any], labels: torch.Tensor) -> bool:
    """Whether the model needs the labels, (B, T), because it shifts them to get its decoder's inputs."""
    is_encoder_decoder = getattr(model.get_base_model().config, "is_encoder_decoder", False)
    return bool(is_encoder_decoder) and labels.dim() == 2 and not any(k.startswith("decoder_input") for k in inputs)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def untrained_adapter(model: PeftModel, seed: int) -> Iterator[str]:
    """Inside the context, a fresh adapter with the active one's config is active; it is removed afterwards.

    Args:
        seed: of the fresh adapter's weights; the global random state is left alone.

    Yields:
        The fresh adapter's name.
    """
    active: Any = model.active_adapter
    name = "untrained"
    while name in model.peft_config:
        name += "_"
    config: Any = copy.deepcopy(model.peft_config[active])
    inference_mode, config.inference_mode = config.inference_mode, False
    config.modules_to_save = None  # noted when an adapter is attached
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(name, config)
    try:
        model.set_adapter(name)
        yield name
    finally:
        model.set_adapter(active, inference_mode=inference_mode)
        model.delete_adapter(name)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
