"""What a task is (`TaskSpec`), which are known by name, and what loading one gives (`TaskData`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from sparsepeft.errors import TaskError, unknown_name
from sparsepeft.extras import require

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import ArrayLike

    from sparsepeft.tasks.columns import Columns


@dataclass(frozen=True)
class TaskSpec:
    """A task of labels or values for texts, or of a label for each token of a text.

    Attributes:
        name: the name results are reported under.
        text_columns: ``("text",)`` or ``("text", "text_pair")``, the columns of every loaded dataset.
        label_names: by class index; ``None`` for regression.
        metrics: names of what `compute_metrics` computes, in order.
        main_metric: the score to compare by: one of ``metrics``, or a name such as ``pearson_spearman`` for the mean of
            those it names; any other name stands for the mean of all.
        paper_epochs: epochs in the SPARTAN paper (arXiv:2211.16634); a sensible number for tasks it does not have.
        multi_label: several labels may hold for one text, or none.
        labels_tokens: each token has a label; texts are then sentences, tokens with a space between.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str
    paper_epochs: int
    multi_label: bool = False
    labels_tokens: bool = False

    @property
    def num_labels(self) -> int:
        """Width of the model's output; 1 for regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def problem_type(self) -> str:
        """The name `transformers` gives to the kind of loss; ``"token_classification"`` where tokens are labelled."""
        if self.labels_tokens:
            return "token_classification"
        if self.label_names is None:
            return "regression"
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @property
    def input_columns(self) -> tuple[str, ...]:
        """What an input is made of: its texts, or its list of tokens."""
        return ("tokens",) if self.labels_tokens else self.text_columns

    @property
    def is_pair(self) -> bool:
        """Whether an example is two texts."""
        return len(self.text_columns) == 2

    def compute_metrics(
        self, predictions: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Score logits against labels.

        Args:
            predictions: logits (N, C); regression also takes (N,) besides (N, 1); (N, T, C) where tokens are labelled.
            labels: class indices or values, (N,); ones and zeros, (N, C), where several labels may hold; where tokens
                are labelled class indices, (N, T), and -100 for what is no token.
            thresholds: where several labels may hold, the probability above which each does; None is 0.5 for all.

        Returns:
            ``metrics`` in order, then ``main_metric`` where it is a mean. Always finite: a constant prediction has
            correlation 0.0, a classification row with a NaN counts as wrong, and outputs of a regression that are not
            finite have correlation 0.0 and the largest error that float32 holds.

        Raises:
            TaskError: shapes do not fit each other or the task, or there are no rows.
        """
        from sparsepeft.tasks.metrics import compute  # numpy loads late

        return compute(self, predictions, labels, thresholds)


@dataclass(frozen=True)
class TaskData:
    """A loaded task.

    Every dataset has the columns ``spec.text_columns`` (strings) and ``label`` (int64 class index, or float32; a list
    of ones and zeros, float32, where several labels may hold). Where tokens are labelled it also has ``tokens`` (a list
    of strings), and ``label`` is a list of class indices.

    Attributes:
        spec: the task.
        train: training examples.
        validation: what results are reported on where there is no test set with labels.
        test: test examples with labels, or ``None`` where they are not public.
        extra: further labelled sets by name, such as ``validation_mismatched``.
        notes: what a reader of the results must know, such as that a set is only part of the published one.
        source: where the data came from.
        fingerprints: ``"sha256:<hex>"`` of each file read, the training file's first; of the rows, for data from the
            hub.
        drawn: parts that were drawn by a seed from the rows that ``train`` is the rest of.
        columns: what the texts and the label are called in own files.
    """

    spec: TaskSpec
    train: Dataset
    validation: Dataset
    test: Dataset | None
    extra: dict[str, Dataset] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    source: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()
    columns: Columns | None = None

    @property
    def scored_parts(self) -> dict[str, Dataset]:
        """The labelled parts that are not trained on, by name."""
        return {"validation": self.validation, **self.extra} | ({} if self.test is None else {"test": self.test})

    def scored_part(self, name: str) -> Dataset:
        """One of them.

        Raises:
            TaskError: there is none of this name.
        """
        if name not in self.scored_parts:
            raise TaskError(unknown_name(f"The split of {self.spec.name}", name, self.scored_parts))
        return self.scored_parts[name]


def build_dataset(spec: TaskSpec, rows: list[tuple[Any, ...]]) -> Dataset:
    """Make the dataset of rows ``(text[, text_pair], label)``, or ``(tokens, labels)`` where tokens are labelled."""
    datasets = require("datasets", "train", "Loading a task's data")
    names, texts = (*spec.text_columns, "label"), {name: datasets.Value("string") for name in spec.text_columns}
    label: Any = datasets.Value("float32" if spec.label_names is None else "int64")
    if spec.multi_label:
        label = datasets.List(datasets.Value("float32"), length=spec.num_labels)
    if spec.labels_tokens:
        rows = [(" ".join(tokens), list(tokens), labels) for tokens, labels in rows]
        names = (*spec.text_columns, *spec.input_columns, "label")
        texts["tokens"], label = datasets.List(datasets.Value("string")), datasets.List(label)
    features = datasets.Features({**texts, "label": label})
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    return datasets.Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)), features=features)


ONE: Final = ("text",)
PAIR: Final = ("text", "text_pair")
CUSTOM: Final = "custom"
LANGUAGE_MODEL: Final = "lm"  # has text, but neither labels nor a `TaskSpec`
ENTITY_METRICS: Final = ("f1", "precision", "recall", "accuracy")

_NEWS: Final = ("business", "entertainment", "politics", "sport", "tech")
_TOPICS: Final = ("business", "health", "science", "sport", "travel")
_THINGS: Final = ("corporation", "creative-work", "group", "location", "person", "product")
_TAGS: Final = ("O", *(f"{place}-{thing}" for thing in _THINGS for place in "BI"))
_EMOTIONS: Final = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)
_SEVERAL: Final = ("macro_f1", "micro_f1", "subset_accuracy")
# Class indices and metrics are GLUE's (and the hub's); epochs: arXiv:2211.16634, 10 where the paper has no such task;
# GoEmotions' are those of arXiv:2005.00547.
_SPECS: Final = (
    TaskSpec("cola", ONE, ("unacceptable", "acceptable"), ("matthews_correlation",), "matthews_correlation", 20),
    TaskSpec("sst2", ONE, ("negative", "positive"), ("accuracy",), "accuracy", 3),
    TaskSpec("mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "accuracy_f1", 20),
    TaskSpec("qqp", PAIR, ("not_duplicate", "duplicate"), ("accuracy", "f1"), "accuracy", 3),
    TaskSpec("stsb", PAIR, None, ("pearson", "spearman"), "pearson_spearman", 20),
    TaskSpec("mnli", PAIR, ("entailment", "neutral", "contradiction"), ("accuracy",), "accuracy", 3),
    TaskSpec("qnli", PAIR, ("entailment", "not_entailment"), ("accuracy",), "accuracy", 20),
    TaskSpec("rte", PAIR, ("entailment", "not_entailment"), ("accuracy",), "accuracy", 20),
    TaskSpec("wnli", PAIR, ("not_entailment", "entailment"), ("accuracy",), "accuracy", 3),
    TaskSpec("bbc-news", ONE, _NEWS, ("accuracy", "macro_f1"), "accuracy", 10),
    TaskSpec("topics", ONE, _TOPICS, ("accuracy", "macro_f1"), "accuracy", 10),
    TaskSpec("wnut17", ONE, _TAGS, ENTITY_METRICS, "f1", 10, labels_tokens=True),
    TaskSpec("goemotions", ONE, _EMOTIONS, _SEVERAL, "macro_f1", 4, multi_label=True),
)
SPECS: Final = MappingProxyType({spec.name: spec for spec in _SPECS})
GLUE_TASKS: Final = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")


def task_names() -> list[str]:
    """Every name that `load_task` knows; ``custom`` stands for your own files."""
    return [*SPECS, CUSTOM]


def canonical_name(name: str) -> str:
    """Resolve a spelling such as ``SST-2`` or ``bbc`` to the task's name.

    Raises:
        TaskError: no such task; lists the names and suggests the nearest.
    """
    known = {_squash(task): task for task in task_names()} | {"bbc": "bbc-news"}
    squashed = _squash(name)
    if squashed in known:
        return known[squashed]
    if squashed == LANGUAGE_MODEL:
        raise TaskError(
            f"the task {name!r} is a language model's, which has no labelled data; train it with `sparsepeft train` or "
            "sparsepeft.training.train"
        )
    near = difflib.get_close_matches(squashed, known, n=1, cutoff=0.5)
    hint = f"did you mean {known[near[0]]!r}? " if near else ""
    raise TaskError(
        f"unknown task {name!r}: {hint}the tasks are {', '.join(task_names())} (your own `train_file`) and "
        f"{LANGUAGE_MODEL} (a language model on your own `text`)"
    )


def task_spec(name: str) -> TaskSpec:
    """Give the description of a named task without loading its data (``custom`` has none before its files are read)."""
    name = canonical_name(name)
    if name == CUSTOM:
        raise TaskError("the task 'custom' has no fixed description; load it from its files with load_task")
    return SPECS[name]


def _squash(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())
