"""Labels for texts from a trained run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sparsepeft.backbones import backbone_of_run
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Encoded, Encoder
from sparsepeft.inference.predictions import Input, OnError, Prediction, check_on_error, listed, prediction, texts_of
from sparsepeft.methods.models import load_tokenizer, load_trained, to_accelerator
from sparsepeft.runs.config import LM, RunConfig
from sparsepeft.runs.files import columns_of, read_run, spec_of
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import Columns


class Predictor:
    """A run's model, ready for texts.

    Args:
        folder: the output folder of ``sparsepeft train``.
        model: the backbone, if it has moved since.
        batch_size: inputs per forward pass.
        device: where to compute, such as ``"cpu"``; None is the accelerator, if there is one.

    Attributes:
        spec: the task.
        config: what the run was made with.
        columns: what texts and label were called in the training file; None where that was none of the user's own.

    Raises:
        UserError: the folder holds no finished training, its files are damaged, the backbone is gone or another, or
            there is no such device.
    """

    def __init__(
        self, folder: str | Path, model: str | None = None, batch_size: int = 32, device: str | None = None
    ) -> None:
        self.folder = Path(folder)
        run = read_run(self.folder)
        if run["task"] == LM:
            raise UserError(
                f"{self.folder} holds a language model, which has no labels to predict; `sparsepeft generate` "
                "continues texts with it, and `sparsepeft evaluate` gives its perplexity."
            )
        if batch_size < 1:
            raise UserError(f"`batch_size={batch_size}` was given; pass the number of inputs of a pass, at least 1.")
        find_device(device)  # before anything is loaded
        self.spec: TaskSpec = spec_of(run)
        self.config = RunConfig(**run["config"])
        self.columns: Columns | None = columns_of(run)
        self.batch_size = batch_size
        if not list(self.folder.glob("*.safetensors")):
            raise UserError(f"{self.folder} holds no trained weights yet; finish its training by the same command.")
        method = self.config.method
        home = str(self.folder) if method == "full" else backbone_of_run(self.folder, model, self.config.model)
        self.model = load_trained(
            self.folder, method, home, self.spec, self.config.spt is not None, run.get("backbone_fingerprint")
        )
        to_accelerator(self.model, device)
        self.tokenizer = load_tokenizer(home)
        self._encoder = Encoder(self.tokenizer, self.model.config)
        self.max_length = self._encoder.longest(self.config.max_length)

    def __repr__(self) -> str:
        labels = "a value" if self.spec.label_names is None else f"{self.spec.num_labels} labels"
        return f"Predictor({str(self.folder)!r}: {self.spec.name}, {self.config.method}, {labels})"

    def logits(self, texts: Sequence[Input]) -> np.ndarray:
        """(N, num_labels) in the order of ``texts``, which are computed in order of length.

        Args:
            texts: each a text, a pair of texts, or a dictionary with ``text`` and, for a pair, ``text_pair``; a single
                text or dictionary is taken for a list of one. A text may be empty.

        Raises:
            UserError: one is none of these, or has another number of texts than the task takes.
        """
        num_texts = len(self.spec.text_columns)
        return self._logits(self._encode([texts_of(text, num_texts, may_be_empty=True) for text in listed(texts)]))

    def check(self, text: Input) -> None:
        """See that the task can take an input.

        Raises:
            UserError: it is none, has an empty text, or another number of texts than the task takes.
        """
        texts_of(text, len(self.spec.text_columns))

    def predict(self, texts: Sequence[Input], on_error: OnError = "raise") -> list[Prediction]:
        """A prediction for each input, in order.

        Args:
            texts: as for :meth:`logits`, but none may be empty.
            on_error: ``"return"`` puts a prediction with :attr:`Prediction.error` in the place of an input that cannot
                be answered; ``"raise"`` raises a ``UserError``.
        """
        check_on_error(on_error)
        answers: dict[int, Prediction] = {}
        good: dict[int, tuple[str, ...]] = {}
        for place, text in enumerate(listed(texts)):
            try:
                good[place] = texts_of(text, len(self.spec.text_columns))
            except UserError as error:
                if on_error == "raise":
                    raise
                answers[place] = Prediction.failed(str(error))
        encoded = self._encode([*good.values()])
        for place, one, row in zip(good, encoded, self._logits(encoded), strict=True):
            answers[place] = prediction(
                row, self.spec.label_names, multi_label=self.spec.multi_label, truncated=one.truncated
            )
        return [answers[place] for place in range(len(answers))]

    def predict_stream(self, texts: Iterable[Input]) -> Iterator[Prediction]:
        """Like :meth:`predict` for inputs that arrive one by one, a few batches at a time."""
        iterator = iter(listed(texts))
        size = 8 * self.batch_size if self.batch_size > 1 else 1  # batch size 1 answers line by line
        while chunk := list(islice(iterator, size)):
            yield from self.predict(chunk)

    def _encode(self, inputs: list[tuple[str, ...]]) -> list[Encoded]:
        return self._encoder(inputs, self.max_length)

    @torch.inference_mode()
    def _logits(self, inputs: list[Encoded]) -> np.ndarray:
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        result = np.zeros((len(inputs), self.spec.num_labels), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self._encoder.collate([inputs[row] for row in rows], self.model.device)
            result[rows] = self.model(**batch).logits.float().cpu().numpy()
        return result
