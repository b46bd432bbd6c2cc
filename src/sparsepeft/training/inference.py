"""Using a trained run: labels for texts, metrics for datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.predictions import Input, Prediction, listed, prediction, read_input
from sparsepeft.tasks import TaskSpec
from sparsepeft.training.config import RunConfig
from sparsepeft.training.encoding import longest_input
from sparsepeft.training.files import read_run, spec_of
from sparsepeft.training.language_model import evaluate_language_model
from sparsepeft.training.lm_config import LM
from sparsepeft.training.methods import load_tokenizer, load_trained
from sparsepeft.training.run import load_data


class Predictor:
    """A run's model, ready for texts.

    Args:
        folder: the output folder of ``sparsepeft train``.
        model: the backbone, if it has moved since.
        batch_size: inputs per forward pass.

    Raises:
        UserError: the folder holds no finished training, its files are damaged, or the backbone is another.
    """

    def __init__(self, folder: str | Path, model: str | None = None, batch_size: int = 32) -> None:
        self.folder = Path(folder)
        run = read_run(self.folder)
        if run["task"] == LM:
            raise UserError(
                f"{self.folder} holds a language model, which has no labels to predict; `sparsepeft generate` "
                "continues texts with it, and `sparsepeft evaluate` gives its perplexity."
            )
        self.spec: TaskSpec = spec_of(run)
        self.config = RunConfig(**run["config"])
        model_id = resolve_model(model or self.config.model)
        self.batch_size = batch_size
        if not list(self.folder.glob("*.safetensors")):
            raise UserError(f"{self.folder} holds no trained weights yet; finish its training by the same command.")
        self.model = load_trained(
            self.folder, self.config.method, model_id, self.spec, is_sparse=self.config.spt is not None
        )
        self.tokenizer = load_tokenizer(str(self.folder) if self.config.method == "full" else model_id)
        self.max_length = longest_input(self.tokenizer, self.model.config, self.config.max_length)

    def logits(self, texts: Sequence[Input]) -> np.ndarray:
        """(N, num_labels) in the order of ``texts``, which are computed in order of length.

        Args:
            texts: each a text, a pair of texts, or a dictionary with ``text`` and, for a pair, ``text_pair``; a single
                text or dictionary is taken for a list of one.

        Raises:
            UserError: one is none of these, or has another number of texts than the task takes.
        """
        inputs = [self._columns(text) for text in listed(texts)]
        if not inputs:
            return np.zeros((0, self.spec.num_labels), dtype=np.float32)
        columns = [list(column) for column in zip(*inputs, strict=True)]
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        order = sorted(range(len(inputs)), key=lambda i: len(encoded["input_ids"][i]))
        result = np.zeros((len(inputs), self.spec.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({k: [v[i] for i in rows] for k, v in encoded.items()}, return_tensors="pt")
            with torch.inference_mode():
                result[rows] = self.model(**batch.to(self.model.device)).logits.float().cpu().numpy()
        return result

    def predict(self, texts: Sequence[Input]) -> list[Prediction]:
        """A prediction for each input, in order; see :meth:`logits`."""
        return [prediction(row, self.spec.label_names) for row in self.logits(texts)]

    def predict_stream(self, texts: Iterable[Input]) -> Iterator[Prediction]:
        """Like :meth:`predict` for inputs that arrive one by one, a few batches at a time."""
        iterator = iter(listed(texts))
        size = 8 * self.batch_size if self.batch_size > 1 else 1  # batch size 1 answers line by line
        while chunk := list(islice(iterator, size)):
            yield from self.predict(chunk)

    def _columns(self, text: Input) -> tuple[str, ...]:
        columns = read_input(text)
        if len(columns) != len(self.spec.text_columns):
            raise UserError(
                f"The task {self.spec.name} takes {len(self.spec.text_columns)} text(s) per input, but {len(columns)} "
                "were given; pass as many."
            )
        return columns


def evaluate(folder: str | Path, data_dir: str | None = None, model: str | None = None) -> dict[str, dict[str, float]]:
    """Metrics of a run's model on every labelled part that is not trained on, by name of the part.

    For a language model that is the perplexity on its validation text.
    """
    if read_run(Path(folder))["task"] == LM:
        return evaluate_language_model(folder, model)
    predictor = Predictor(folder, model)
    if data_dir is not None:
        predictor.config.data_dir = data_dir
    data = load_data(predictor.config)
    parts = {"validation": data.validation, **data.extra}
    if data.test is not None:
        parts["test"] = data.test
    return {name: _score(predictor, part) for name, part in parts.items()}


def _score(predictor: Predictor, part: Dataset) -> dict[str, float]:
    columns = [part[name][:] for name in predictor.spec.text_columns]
    texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    return predictor.spec.compute_metrics(predictor.logits(texts), part["label"][:])
