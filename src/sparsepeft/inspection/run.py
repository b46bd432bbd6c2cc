"""Inspecting what ``sparsepeft train`` left in a folder, over held-out texts of its task."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Collator, batches_by_length
from sparsepeft.inference.predictor import Predictor
from sparsepeft.inference.sentences import windows_of
from sparsepeft.inspection.collect import find_memories, inspect_memories
from sparsepeft.inspection.labels import quantile_edges
from sparsepeft.inspection.report import MemoryReport
from sparsepeft.inspection.words import Words, encode_with_words
from sparsepeft.runs.held_out import held_out_data
from sparsepeft.tasks import subsample
from sparsepeft.tasks.labels import SINGLE
from sparsepeft.tasks.token_metrics import NO_TOKEN

if TYPE_CHECKING:
    from datasets import Dataset


def inspect_run(
    folder: str | Path,
    *,
    split: str | None = None,
    layer: int | None = None,
    max_examples: int | None = None,
    data_dir: str | None = None,
    model: str | None = None,
    batch_size: int = 32,
    compare_untrained: bool = False,
    keep_stop_words: bool = False,
    device: str | None = None,
) -> MemoryReport:
    """What each parent cell of a trained run is picked for, on texts it was not trained on.

    Args:
        folder: the output folder of ``sparsepeft train``.
        split: ``"validation"``, ``"test"`` or another labelled part of the task; None takes the test part where there
            is one, else the validation part.
        layer: only this layer, by its position in its stack; None takes all.
        max_examples: a sample of so many, stratified by label; None takes all.
        data_dir: where the task's files are, if they have moved since training.
        model: the backbone, if it has moved since training.
        batch_size: texts per forward pass.
        compare_untrained: also inspect a fresh memory of the same config and seed on the same backbone.
        keep_stop_words: also list function words and punctuation.
        device: where to compute; None is the accelerator, if there is one.

    Raises:
        UserError: the folder holds no trained memory, or layer or split are unknown or empty.
    """
    predictor = Predictor(folder, model, batch_size, device)
    find_memories(predictor.model, layer)  # before data is read
    data = held_out_data(predictor.folder, data_dir)
    name = split or ("test" if "test" in data.scored_parts else "validation")
    part = data.scored_part(name)
    if max_examples is not None:
        part = subsample(part, max_examples, predictor.config.seed)
    if not len(part):
        raise UserError(f"`split={name}` was given, but that part of {data.spec.name} is empty; choose another.")
    report = inspect_memories(
        predictor.model,
        Batches(predictor, part),
        label_names=data.spec.label_names,
        label_edges=quantile_edges(part["label"][:]) if data.spec.label_names is None else None,
        layer=layer,
        compare_untrained=compare_untrained,
        keep_stop_words=keep_stop_words,
        seed=predictor.config.seed,
    )
    source = {
        "task": data.spec.name,
        "split": name,
        "examples": len(part),
        "max_length": predictor.max_length,
        "model": describe_backbone(resolve_model(model or predictor.config.model)),
        "seed": predictor.config.seed,
        "data_source": data.source,
        "data_fingerprints": dict(data.fingerprints),
        "keep_stop_words": keep_stop_words,
    }
    return dataclasses.replace(report, source=source, notes=(*report.notes, *data.notes))


class Batches:
    """Texts of a dataset as padded batches with labels and words, sorted by length; can be read repeatedly.

    Args:
        predictor: whose tokenizer, longest input and batch size are used.
        dataset: the texts, with the task's columns and ``label``.
    """

    def __init__(self, predictor: Predictor, dataset: Dataset) -> None:
        self._predictor, self._dataset = predictor, dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches of at most the predictor's batch size, in an order that needs little padding."""
        if self._predictor.spec.labels_tokens:
            yield from self._of_tokens()
            return
        columns, size = self._predictor.spec.text_columns, self._predictor.batch_size
        label_dtype = torch.long if self._predictor.spec.problem_type == SINGLE else torch.float
        lengths = [sum(map(len, texts)) for texts in zip(*(self._dataset[name][:] for name in columns), strict=True)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(order), size):
            rows = self._dataset[order[start : start + size]]
            texts = [rows[name] for name in columns]
            batch = encode_with_words(self._predictor.tokenizer, *texts, max_length=self._predictor.max_length)
            yield batch | {"labels": torch.tensor(rows["label"], dtype=label_dtype)}

    def _of_tokens(self) -> Iterator[dict[str, Any]]:
        """The same with a label for each position: the tag of the token that it is a piece of.

        The parts of a long sentence are a batch of their own, as one document.
        """
        predictor, texts, tags = self._predictor, self._dataset["tokens"][:], self._dataset["label"][:]
        windows = windows_of(predictor.tokenizer, texts, predictor.max_length)
        sentences = [list(parts) for _, parts in itertools.groupby(windows, lambda one: one.sentence)]
        collator = Collator(predictor.tokenizer)
        whole = [parts for parts in sentences if len(parts) == 1]
        together = batches_by_length([len(parts[0].tokens) for parts in whole], max_rows=predictor.batch_size)
        batches = [
            *([whole[row] for row in rows] for rows in together),
            *([each] for each in sentences if len(each) > 1),
        ]
        for documents in batches:
            parts = [(document, part) for document, its in enumerate(documents) for part in its]
            chosen = [part for _, part in parts]
            found = [(one.sentence, token) for one in chosen for token in one.tokens if token is not None]
            numbers = iter(range(len(found)))
            of_pieces = [[NO_TOKEN if token is None else next(numbers) for token in one.tokens] for one in chosen]
            batch = collator([{**one.features, "labels": each} for one, each in zip(chosen, of_pieces, strict=True)])
            occurrence = batch["labels"].numpy()
            batch["labels"] = torch.full_like(batch["labels"], NO_TOKEN)
            batch["labels"][torch.from_numpy(occurrence >= 0)] = torch.tensor(
                [tags[row][token] for row, token in found]
            )
            words = Words([texts[row][token] for row, token in found], np.maximum(occurrence, -1))
            yield {**batch, "words": words, "documents": np.array([document for document, _ in parts])}
