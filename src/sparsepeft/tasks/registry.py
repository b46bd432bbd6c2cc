"""The tasks that are known by name."""

from __future__ import annotations

import difflib
from types import MappingProxyType
from typing import Final

from sparsepeft.tasks.errors import TaskError
from sparsepeft.tasks.spec import TaskSpec

ONE: Final = ("text",)
PAIR: Final = ("text", "text_pair")
CUSTOM: Final = "custom"
LANGUAGE_MODEL: Final = "lm"  # has text, but neither labels nor a `TaskSpec`

# Class indices and metrics are GLUE's (and the hub's); epochs: arXiv:2211.16634, 10 where the paper has no such task.
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
    TaskSpec(
        "bbc-news",
        ONE,
        ("business", "entertainment", "politics", "sport", "tech"),
        ("accuracy", "macro_f1"),
        "accuracy",
        10,
    ),
    TaskSpec(
        "topics", ONE, ("business", "health", "science", "sport", "travel"), ("accuracy", "macro_f1"), "accuracy", 10
    ),
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
