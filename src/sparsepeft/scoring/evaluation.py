"""Scores of a trained run, on what it was not trained on or on a file of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import longest_input
from sparsepeft.inference.predictor import Predictor
from sparsepeft.inference.sentences import SENTENCE, by_sentence, encode_sentences
from sparsepeft.inference.tasks import trained_run
from sparsepeft.methods.language_models import load_trained_language_model, perplexity
from sparsepeft.methods.models import load_tokenizer, to_accelerator
from sparsepeft.methods.sparse import by_infer
from sparsepeft.rows.formats import FileFormat
from sparsepeft.rows.reading import read_rows, sha256
from sparsepeft.runs.config import LM, RunConfig
from sparsepeft.runs.corpus import cut, fingerprints, join, load_corpus, read_documents
from sparsepeft.runs.files import read_run
from sparsepeft.runs.held_out import held_out_data, not_held_out_any_more, read_held_out
from sparsepeft.scoring.questions import TableOptions
from sparsepeft.tasks.columns import Columns, choose_label_column, choose_text_columns, choose_token_columns

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
Answered = tuple[dict[str, dict[str, Any]], dict[str, Any], tuple[str, ...]]


@dataclass(frozen=True)
class Evaluation(Mapping[str, dict[str, float]]):
    """What a run's model scores: the metrics of each part by its name, and more about them.

    Attributes:
        metrics: by name of the part, such as ``"validation"``; ``"test"`` for a file that was given.
        num_rows: rows of each part; empty for a language model.
        report: by name of the part, for classification: precision, recall, F1 and support of each class, and the
            confusion matrix (rows are true, columns predicted classes), see :func:`sparsepeft.tasks.metrics.report`.
        notes: what a reader of the scores must know, such as that the data has changed since training.
        data_fingerprints: SHA-256 of the files, by name.
        metrics_at_half: ``metrics`` with 0.5 as the threshold of every label, where training chose others.
        metrics_by_infer: for a sparse model whose answers are other than the dense one's: ``metrics`` in either way,
            under ``"sparse"`` and ``"dense"``.
    """

    metrics: dict[str, dict[str, float]]
    num_rows: dict[str, int] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data_fingerprints: dict[str, str] = field(default_factory=dict)
    metrics_at_half: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics_by_infer: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def __getitem__(self, part: str) -> dict[str, float]:
        return self.metrics[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, with the metrics of each part under its name."""
        content = asdict(self) | {"notes": list(self.notes)}
        return content.pop("metrics") | content


def evaluate(
    folder: str | Path,
    data_dir: str | None = None,
    model: str | None = None,
    *,
    test_file: str | Path | None = None,
    table: TableOptions | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    infer: str | None = None,
) -> Evaluation:
    """Score a run's model on every labelled part that it was not trained on, or on a file.

    For a language model that is the perplexity on its validation text.

    Args:
        folder: the output folder of ``sparsepeft train``.
        data_dir: where the task's files are, if they have moved since training.
        model: the backbone, if it has moved since.
        test_file: score these rows instead, with the run's labels.
        table: how to read them.
        batch_size: inputs per forward pass; None is 32, for a language model as many blocks as in training.
        device: where to compute; None is the accelerator, if there is one.
        infer: score a sparse model as it is or as the dense model that it was made from, see
            :class:`sparsepeft.spt.SptConfig`; None scores both.

    Raises:
        UserError: the folder holds no finished training, data or backbone are gone or damaged, a label is none of the
            run's, or it cannot be told any more which rows were trained on.

    Example:
        >>> scores = evaluate("out/topics")
        >>> sorted(scores)
        ['test', 'validation']
        >>> sorted(scores["test"])
        ['accuracy', 'macro_f1']
    """
    folder, table = Path(folder), table or TableOptions()
    run = read_run(folder)
    if test_file is None and table != TableOptions():
        raise UserError("Columns or a format were named without a file; pass `test_file`, too.")
    if run["task"] == LM:
        return _evaluate_language_model(folder, run, model, test_file, table, batch_size, device, infer)
    predictor = Predictor(folder, model, 32 if batch_size is None else batch_size, device, infer)
    if test_file is not None:
        path = Path(test_file)
        file_format, digest = table.format_of(path), sha256(path)
        part, of_labels = _rows(path, predictor, table, file_format)
        notes = (*file_format.notes, *of_labels)
        if next(iter((run.get("data_fingerprints") or {}).values()), None) == digest:
            notes += (f"{path.name} is the file that the run was trained on: its scores say nothing about new texts",)
        return _evaluation(predictor, {"test": part}, notes, {path.name: digest}, infer)
    data = held_out_data(folder, data_dir, run=run)
    return _evaluation(predictor, data.scored_parts, data.notes, data.fingerprints, infer)


def _rows(
    path: Path, predictor: Predictor, table: TableOptions, file_format: FileFormat
) -> tuple[Dataset, tuple[str, ...]]:
    from sparsepeft.tasks.local import load_labelled

    trained = predictor.columns or Columns((), "")
    header = list(next(iter(read_rows(path, file_format))).values)
    if predictor.spec.labels_tokens:
        named = (table.text_column, table.text_pair_column, table.label_column)
        columns = choose_token_columns(path, header, *named, trained)
        return load_labelled(path, predictor.spec, columns, file_format)
    names = predictor.spec.label_names if predictor.spec.multi_label else None
    label = choose_label_column(path, header, table.label_column, trained.label, names or ())
    texts = choose_text_columns(
        path,
        [name for name in header if name not in Columns((), label).labels],
        len(predictor.spec.text_columns),
        table.text_column,
        table.text_pair_column,
        trained.texts,
    )
    return load_labelled(path, predictor.spec, Columns(texts, label), file_format)


def _evaluation(
    predictor: Predictor,
    parts: dict[str, Dataset],
    notes: tuple[str, ...],
    fingerprints: dict[str, str],
    infer: str | None,
) -> Evaluation:
    from sparsepeft.tasks.metrics import report

    spec, thresholds = predictor.spec, predictor.thresholds
    answers, labels, more = (_of_tokens if spec.labels_tokens else _of_texts)(predictor, parts, infer)
    scores = {
        way: {name: spec.compute_metrics(logits, labels[name], thresholds) for name, logits in answer.items()}
        for way, answer in answers.items()
    }
    own = next(iter(answers.values()))
    reports = {n: classes for n, logits in own.items() if (classes := report(spec, logits, labels[n], thresholds))}
    at_half = {n: spec.compute_metrics(logits, labels[n]) for n, logits in own.items() if thresholds is not None}
    return Evaluation(
        metrics=next(iter(scores.values())),
        num_rows={name: len(part) for name, part in parts.items()},
        report=reports,
        notes=(*notes, *more),
        data_fingerprints=dict(fingerprints),
        metrics_at_half=at_half,
        metrics_by_infer=_if_several(scores),
    )


def _of_texts(predictor: Predictor, parts: dict[str, Dataset], infer: str | None) -> Answered:
    """Logits by how the model answers and by part, labels by part, and notes."""
    texts = {}
    for name, part in parts.items():
        columns = [part[column][:] for column in predictor.spec.text_columns]
        texts[name] = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    answers = _by_infer(predictor.model, lambda: {n: predictor.logits(part) for n, part in texts.items()}, infer)
    return answers, {name: part["label"][:] for name, part in parts.items()}, ()


def _of_tokens(predictor: Predictor, parts: dict[str, Dataset], infer: str | None) -> Answered:
    """The same where tokens are labelled."""
    encoded = {name: encode_sentences(part, predictor.tokenizer, predictor.max_length) for name, part in parts.items()}
    notes = [f"{name}: {note}" for name, each in encoded.items() for note in each.notes(predictor.max_length)]
    labels: dict[str, Any] = {}

    def answer() -> dict[str, Any]:
        answered = {}
        for name, (rows, *_) in encoded.items():
            tags, places = rows["labels"][:], rows[SENTENCE][:]
            inputs = rows.remove_columns(["labels", "length", SENTENCE]).to_list()
            answered[name], labels[name] = by_sentence(predictor.token_logits(inputs), tags, places)
        return answered

    return _by_infer(predictor.model, answer, infer), labels, tuple(notes)


def _by_infer(model: Any, score: Callable[[], T], infer: str | None) -> dict[str, T]:
    """A score for each way in which a model answers, or for the one that it was loaded for."""
    return by_infer(model, score) if infer is None else {infer: score()}


def _if_several(scores: dict[str, Any]) -> dict[str, Any]:
    return scores if len(scores) > 1 else {}


def _evaluate_language_model(
    folder: Path,
    run: dict[str, Any],
    model: str | None,
    test_file: str | Path | None,
    table: TableOptions,
    batch_size: int | None,
    device: str | None,
    infer: str | None,
) -> Evaluation:
    """Perplexity of a run's model on its validation text, or on a file."""
    for name in ("label_column", "text_pair_column"):
        if (value := getattr(table, name)) is not None:
            raise UserError(f"`{name}={value}` was given, but {folder} is a language model's run; leave it out.")
    config, trained = RunConfig(**run["config"]), trained_run(folder, run, model, infer)
    files = [*config.text, *config.validation_text] if test_file is None else [str(test_file)]
    if test_file is None:
        held_out, notes = _held_out_text(folder, config, run)
    else:
        column, encoding = table.text_column or config.text_column or "text", table.encoding or config.encoding
        documents = read_documents(files, column, table.delimiter, encoding)
    loaded = load_trained_language_model(trained)
    to_accelerator(loaded, device)
    tokenizer = load_tokenizer(trained.backbone)
    block_length = longest_input(tokenizer, loaded.config, config.block_length, "block_length")
    # A run of an earlier version says nothing of the token that blocks begin with, and had none.
    begin, digests = run.get("bos_token_id"), fingerprints(files)
    if test_file is None:
        corpus = load_corpus(config, tokenizer, block_length, begin, held_out=held_out)
        part, blocks, notes = "validation", corpus.validation, (*corpus.notes, *notes)
    else:
        part, blocks, notes = "test", cut(join(documents, tokenizer), block_length, "text of `test_file`", begin), ()
        # The files that were trained on come before those of validation text.
        trained_on = list((run.get("data_fingerprints") or {}).values())[: len(config.text)]
        if set(digests.values()) & set(trained_on):
            notes = (f"{Path(test_file).name} was trained on: its perplexity says nothing about new text",)
    size = config.recipe_values().batch_size if batch_size is None else batch_size
    scores = _by_infer(loaded, lambda: {part: perplexity(loaded, blocks, size, config.precision)}, infer)
    metrics = next(iter(scores.values()))
    return Evaluation(metrics, notes=notes, data_fingerprints=digests, metrics_by_infer=_if_several(scores))


def _held_out_text(folder: Path, config: RunConfig, run: dict[str, Any]) -> tuple[list[str] | None, tuple[str, ...]]:
    """Digests of held-out documents where they must be looked for, and notes."""
    files = [*config.text, *config.validation_text]
    for file in files:
        if not Path(file).exists():
            raise UserError(
                f"The run in {folder} was trained with the file {file}, which is not there any more; put it back, or "
                "measure on other text by `test_file`."
            )
    before = run.get("data_fingerprints") or {}
    changed = [name for name, digest in fingerprints(files).items() if before and digest not in before.values()]
    if not changed:
        return None, ()
    names = ", ".join(changed)
    if config.validation_text:
        return None, (f"{names} {'has' if len(changed) == 1 else 'have'} changed since training",)
    held_out = read_held_out(folder).get("validation")
    if not held_out:
        raise not_held_out_any_more(folder, names, is_known=False)
    return held_out, ()


def confusions(names: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[tuple[int, str, str]]:
    """What was taken for something else: how often, what it is, and what for; the most frequent first.

    Args:
        names: of the classes.
        matrix: counts by true class (row) and predicted class (column).
    """
    rows = zip(names, matrix, strict=True)
    wrong = [(n, true, guess) for true, row in rows for guess, n in zip(names, row, strict=True) if true != guess and n]
    return sorted(wrong, key=lambda counted: -counted[0])
