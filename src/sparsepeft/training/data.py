"""The data of a run, encoded: what is trained on, what checkpoints are chosen on, what is scored at the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase, default_data_collator

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import Collator, encode, longest_input
from sparsepeft.inference.sentences import SENTENCE, encode_sentences
from sparsepeft.methods.language_models import CALIBRATION_BLOCKS, HELD_OUT_TOKENS
from sparsepeft.methods.models import load_model_config, load_tokenizer, note_on_head
from sparsepeft.runs.config import LM, RunConfig
from sparsepeft.runs.corpus import begin_token, count_for, evenly_spaced, fingerprints, load_corpus, without
from sparsepeft.runs.held_out import Digests, digests_of_drawn, load_task_data
from sparsepeft.tasks import TaskData, TaskSpec, few_shot, split_train, subsample
from sparsepeft.tasks.token_metrics import NO_TOKEN
from sparsepeft.training.loss import check_loss
from sparsepeft.training.thresholds import check_thresholds

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_SELECTION = 1000  # examples that hyperparameters are chosen on; a tenth of SST-2 alone would be 6,735
_SPLIT_SEED = 42  # the part of the training data that models are chosen on is the same in every run
_CALIBRATION_EXAMPLES = 64


@dataclass(frozen=True)
class RunData:
    """What a run is trained and scored on.

    Attributes:
        model: the backbone's hub id or folder, whose tokenizer has encoded the data.
        tokenizer: that tokenizer.
        max_length: tokens of an example: at most for labelled texts, exactly for blocks of text.
        train: examples to train on.
        selection: examples that the best checkpoint is chosen on; None takes the last step's weights.
        reported: examples that are scored at the end, by name of the part.
        collator: makes a batch of examples.
        notes: what a reader of the results should know.
        fingerprints: SHA-256 of the files, by name.
        held_out: digests of the texts that were drawn from the training data, by name of the part.
        run_values: what ``run.json`` says of the data.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train: Any
    selection: Any
    reported: Mapping[str, Any]
    collator: Any
    notes: tuple[str, ...]
    fingerprints: dict[str, str]
    held_out: Digests
    run_values: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each part, those that are trained on first."""
        chosen_on = {} if self.selection is None else {"selection": self.selection}
        parts = {"training": self.train, **chosen_on, **self.reported}
        return {name: _num_examples(part) for name, part in parts.items()}


@dataclass(frozen=True)
class LabelledData(RunData):
    """Texts with labels, or sentences of tokens with tags.

    Attributes:
        spec: the task.
        source: where the data came from.
        num_cut: how many texts are longer than ``max_length``.
    """

    spec: TaskSpec
    source: str
    num_cut: int

    @property
    def labels(self) -> np.ndarray:
        """Of the training examples: (N,), or (N, C) where several may hold; of all tokens where these are labelled."""
        labels = self.train["labels"]
        if not self.spec.labels_tokens:
            return np.asarray(labels)
        flat = np.concatenate(labels[:])
        return flat[flat != NO_TOKEN]

    def calibration_batch(self) -> dict[str, Tensor]:
        """Up to 64 examples from the whole of the training data, padded to the longest of them."""
        count = min(_CALIBRATION_EXAMPLES, len(self.train))
        return self.collator([self.train[int(index)] for index in np.linspace(0, len(self.train) - 1, count)])


@dataclass(frozen=True)
class TextData(RunData):
    """Plain text in blocks of tokens, (N, T) int64.

    Attributes:
        begin: id of the token that each block begins with; None if all of it is text.
    """

    begin: int | None

    def calibration_batch(self) -> Tensor:
        """A few blocks from the whole of the training text."""
        return evenly_spaced(self.train, CALIBRATION_BLOCKS)

    def held_out_batch(self) -> Tensor | None:
        """Some of its other blocks, which a budget is to be kept on, too; None where there is none."""
        rest = without(self.train, CALIBRATION_BLOCKS)
        return evenly_spaced(rest, count_for(HELD_OUT_TOKENS, rest)) if len(rest) else None


def prepare_data(config: RunConfig) -> LabelledData | TextData:
    """Read, split and encode what a config names.

    Raises:
        UserError: data or model cannot be used.
    """
    return _prepare_text(config) if config.is_language_model else _prepare_labelled(config)


def _prepare_text(config: RunConfig) -> TextData:
    model = resolve_model(config.model)
    tokenizer = load_tokenizer(model)
    block_length = longest_input(tokenizer, load_model_config(model), config.block_length, "block_length")
    corpus = load_corpus(config, tokenizer, block_length, begin_token(tokenizer, config.bos_token))
    digests = fingerprints([*config.text, *config.validation_text])
    return TextData(
        model=model,
        tokenizer=tokenizer,
        max_length=block_length,
        train=corpus.train,
        selection=None,
        reported={"validation": corpus.validation},
        collator=default_data_collator,
        notes=corpus.notes,
        fingerprints=digests,
        held_out={"validation": list(corpus.held_out)} if corpus.held_out else {},
        run_values={"task": LM, "data_fingerprints": digests, "bos_token_id": corpus.begin},
        begin=corpus.begin,
    )


def _labels_some(labels: list[int]) -> bool:
    """Whether a window has a token to learn; one of a single long token may have only later pieces of it."""
    return any(label != NO_TOKEN for label in labels)


def _prepare_labelled(config: RunConfig) -> LabelledData:
    model = resolve_model(config.model)
    data = load_task_data(config)
    spec = data.spec
    check_loss(spec, config)
    check_thresholds(spec, config)
    tokenizer = load_tokenizer(model)
    max_length = longest_input(tokenizer, load_model_config(model), config.max_length)
    if max_length <= (special := tokenizer.num_special_tokens_to_add(spec.is_pair)):
        raise UserError(
            f"`max_length={max_length}` was given, but the tokenizer adds {special} special tokens to each input, "
            "which leaves no room for text; pass more."
        )
    encoded, num_cut, notes = {}, 0, [*data.notes, *note_on_head(model, spec)]
    for name, part in _split(config, data).items():
        if spec.labels_tokens:
            if name != "train":  # whose batches are made by length
                lengths = list(map(len, part["text"][:]))
                part = part.select(sorted(range(len(part)), key=lengths.__getitem__))
            sentences = encode_sentences(part, tokenizer, max_length)
            encoded[name] = (
                sentences.rows
                if name != "train"
                else sentences.rows.filter(_labels_some, input_columns="labels", keep_in_memory=True)
            )
            notes += [f"{spec.name}, {name}: {note}" for note in sentences.notes(max_length)]
        else:
            encoded[name], cut = encode(part, spec, tokenizer, max_length)
            num_cut += cut
    if num_cut:
        logger.warning("%d texts are longer than %d tokens and were cut to that length.", num_cut, max_length)
    is_scored = {name: name != "train" and (name != "selection" or config.score_on == name) for name in encoded}
    return LabelledData(
        model=model,
        tokenizer=tokenizer,
        max_length=max_length,
        train=encoded["train"],
        selection=None if config.few_shot else encoded["selection"],
        reported={name: part for name, part in encoded.items() if is_scored[name]},
        collator=Collator(tokenizer),
        notes=tuple(notes),
        fingerprints=dict(data.fingerprints),
        held_out=digests_of_drawn(data),
        run_values={
            "task": vars(spec),
            "data_fingerprints": dict(data.fingerprints),
            **({} if data.columns is None else {"columns": data.columns._asdict()}),
        },
        spec=spec,
        source=data.source,
        num_cut=num_cut,
    )


def _num_examples(part: Any) -> int:
    """Rows; sentences where some of them have several rows."""
    is_split = SENTENCE in getattr(part, "column_names", ())
    return len(set(part[SENTENCE][:])) if is_split else len(part)


def _split(config: RunConfig, data: TaskData) -> dict[str, Dataset]:
    """The parts of a run. Few-shot runs use every example for training and take the last step's weights."""
    spec, is_selecting = data.spec, config.score_on == "selection"
    training, selection = split_train(data.train, spec, seed=_SPLIT_SEED)
    if config.few_shot is not None:
        training = few_shot(training if is_selecting else data.train, spec, config.few_shot, config.seed)
    elif config.max_train_samples is not None:
        # The tenth is cut from what is used, so that N samples cost N samples.
        used = subsample(data.train, config.max_train_samples, _SPLIT_SEED)
        training, selection = split_train(used, spec, seed=_SPLIT_SEED)
    if is_selecting:
        return {"train": training, "selection": subsample(selection, MAX_SELECTION, _SPLIT_SEED)}
    chosen_on = {"selection": selection} if config.few_shot is None else {}
    return {"train": training, **data.scored_parts, **chosen_on}
