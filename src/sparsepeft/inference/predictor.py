"""Labels for texts from one trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsepeft.arguments import check_whole
from sparsepeft.devices import find_device
from sparsepeft.inference.answering import Engine, try_out, user_errors
from sparsepeft.inference.encoding import Encoder
from sparsepeft.inference.portable import Input, OnError, Prediction, as_list, texts_of
from sparsepeft.inference.sentences import overlap
from sparsepeft.inference.tasks import LoadedTask, info_of_run, trained_run
from sparsepeft.inference.views import View
from sparsepeft.methods.models import load_tokenizer, load_trained, to_accelerator
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import columns_of, read_run, spec_of
from sparsepeft.tasks import TaskSpec
from sparsepeft.tasks.columns import Columns


class Predictor:
    """A run's model, ready for texts: an engine with one task.

    Args:
        folder: the output folder of ``sparsepeft train``.
        model: the backbone, if it has moved since.
        batch_size: inputs per forward pass.
        device: where to compute, such as ``"cpu"``; None is the accelerator, if there is one.
        infer: answer as the ``"sparse"`` model, or as the ``"dense"`` one that it was made from; None as in training.

    Attributes:
        spec: the task.
        config: what the run was made with.
        columns: what texts and label were called in the training file; None where that was none of the user's own.
        thresholds: where several labels may hold, the probability above which each does; None is 0.5 for all.
        model: the trained model, in eval mode.
        tokenizer: the backbone's.
        max_length: tokens an input may have.

    Raises:
        UserError: the folder holds no finished training, its files are damaged, the backbone is gone or another, or
            there is no such device.

    Example:
        >>> predictor = Predictor("out/topics")
        >>> answers = predictor.predict(["The striker scored twice.", "Shares fell again."])
        >>> len(answers), sorted(answers[0].scores)
        (2, ['business', 'health', 'science', 'sport', 'travel'])
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
        infer: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        run = read_run(self.folder)
        info = info_of_run(self.folder, run)
        batch_size = check_whole("batch_size", batch_size)
        find_device(device)  # before anything is loaded
        self.spec: TaskSpec = spec_of(run)
        self.config = RunConfig(**run["config"])
        self.columns: Columns | None = columns_of(run)
        self.thresholds = info.thresholds
        self.batch_size = batch_size
        trained = trained_run(self.folder, run, model, infer)
        self.model: Any = load_trained(trained, self.spec)
        to_accelerator(self.model, device)
        self.tokenizer = load_tokenizer(trained.backbone)
        view = View(self.model, labels_tokens=self.spec.labels_tokens)
        task = LoadedTask(info, view, trained.method, Encoder(self.tokenizer, self.model.config))
        try_out(task)
        self.max_length = task.max_length
        self._name = self.spec.name
        self._engine = Engine(batch_size=batch_size)
        self._engine.add_loaded(self._name, task)

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
        return self._engine.logits(self._name, texts)

    def token_logits(self, inputs: Sequence[dict[str, list[int]]]) -> list[np.ndarray]:
        """(T, num_labels) for each input of a task that labels tokens: ``input_ids``, ... of T tokens."""
        return self._engine.token_logits(self._name, inputs)

    @user_errors()
    def check(self, text: Input) -> None:
        """See that the task can take an input.

        Raises:
            UserError: it is none, has an empty text, or another number of texts than the task takes.
        """
        texts_of(text, len(self.spec.text_columns))

    @user_errors()
    def predict(self, texts: Sequence[Input], on_error: OnError = "raise") -> list[Prediction]:
        """A prediction for each input, in order. Where tokens are labelled a text may have any length.

        Args:
            texts: as for :meth:`logits`, but none may be empty.
            on_error: ``"return"`` puts a prediction with :attr:`Prediction.error` in the place of an input that cannot
                be answered; ``"raise"`` raises a ``UserError``.
        """
        stride = overlap(self.tokenizer, self.max_length) if self.spec.labels_tokens else None
        return self._engine.predict([(self._name, text) for text in as_list(texts)], on_error=on_error, stride=stride)
