"""The hub: columns as they are there, on small datasets in place of the download; and no network."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from sparsepeft.tasks import TaskError, load_task, task_spec
from sparsepeft.tasks.glue import LAYOUTS
from sparsepeft.tasks.hub import load_splits
from sparsepeft.tasks.spec import GLUE_TASKS


def glue(task: str) -> DatasetDict:
    names = task_spec(task).label_names
    label = Value("float32") if names is None else ClassLabel(names=list(names))
    texts = LAYOUTS[task].hub_texts
    features = Features({**dict.fromkeys(texts, Value("string")), "label": label, "idx": Value("int32")})
    values = [2.5, 0.0] if names is None else [1, 0]

    def part(values: list[Any]) -> Dataset:
        columns = {name: [f"{name} {i}" for i in range(len(values))] for name in texts}
        return Dataset.from_dict({**columns, "label": values, "idx": list(range(len(values)))}, features=features)

    dev = ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)
    hidden = [-1.0 if names is None else -1] * 2
    return DatasetDict({"train": part(values), **{name: part(values) for name in dev}, "test": part(hidden)})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], Any]:
    """What the hub has; asking for anything else fails as without a network."""
    hub: dict[tuple[str, str | None], Any] = {}

    def load_dataset(repository: str, config: str | None = None) -> Any:
        if (repository, config) not in hub:
            raise ConnectionError(f"Couldn't reach {repository!r} on the Hub (OfflineModeIsEnabled)\nmore")
        return hub[repository, config]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("SPARSEPEFT_DATA", raising=False)
    return hub


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_glue(task: str, served: dict[tuple[str, str | None], Any]) -> None:
    served["nyu-mll/glue", task] = glue(task)
    data = load_task(task)
    assert data.train.column_names == [*data.spec.text_columns, "label"]
    assert data.train["label"][:] == ([2.5, 0.0] if task == "stsb" else [1, 0])
    assert data.train.features["label"] == Value("float32" if task == "stsb" else "int64")
    assert data.train[1]["text"] == f"{LAYOUTS[task].hub_texts[0]} 1"
    assert set(data.extra) == ({"validation_mismatched"} if task == "mnli" else set())
    assert data.test is None
    assert data.source == "hub:nyu-mll/glue"
    assert set(data.fingerprints) == {"train", *(name for name in glue(task) if name.startswith("validation"))}
    assert load_task(task).fingerprints == data.fingerprints


def test_hub_by_request_even_with_a_data_folder(served: dict[tuple[str, str | None], Any], tmp_path: Any) -> None:
    served["nyu-mll/glue", "rte"] = glue("rte")
    assert load_task("rte", data_dir=tmp_path, source="hub").source == "hub:nyu-mll/glue"


def test_class_names_decide_not_their_order_on_the_hub(served: dict[tuple[str, str | None], Any]) -> None:
    names = ClassLabel(names=["positive", "negative"])
    reverse = Features({"sentence": Value("string"), "label": names, "idx": Value("int32")})
    part = Dataset.from_dict({"sentence": ["fine", "dull"], "label": [0, 1], "idx": [0, 1]}, features=reverse)
    served["nyu-mll/glue", "sst2"] = DatasetDict(train=part, validation=part)
    assert load_task("sst2").train["label"][:] == [1, 0]


def test_bbc_joins_the_parts_and_splits_anew(served: dict[tuple[str, str | None], Any]) -> None:
    names = ("tech", "business", "sport", "entertainment", "politics")  # the hub's order of indices
    rows = [
        {"text": f"{name} story  {i}", "label": j, "label_text": name} for j, name in enumerate(names) for i in range(8)
    ]
    served["SetFit/bbc-news", None] = DatasetDict(train=Dataset.from_list(rows[:25]), test=Dataset.from_list(rows[20:]))
    data = load_task("bbc-news")
    assert data.test is not None
    seen = [(row["text"], row["label"]) for part in (data.train, data.validation, data.test) for row in part]
    assert len(seen) == len(set(seen)) == 40
    assert (len(data.validation), len(data.test)) == (4, 4)
    assert data.spec.label_names is not None
    assert all(text.split()[0] == data.spec.label_names[label] for text, label in seen)
    assert "5 duplicate texts of 45" in data.notes[1]


def test_several_labels(served: dict[tuple[str, str | None], Any]) -> None:
    names = list(task_spec("goemotions").label_names or ())[::-1]  # the hub's order of indices
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=names)), "id": Value("string")})
    rows = {"text": ["good", "well"], "labels": [[0], [25, 27]], "id": ["x", "y"]}
    part = Dataset.from_dict(rows, features=features)
    served["google-research-datasets/go_emotions", "simplified"] = DatasetDict(train=part, validation=part, test=part)
    data = load_task("goemotions")
    held = [[i for i, value in enumerate(label) if value] for label in data.train["label"][:]]
    assert held == [[27], [0, 2]]
    assert (data.source, len(data.notes)) == ("hub:google-research-datasets/go_emotions", 3)
    assert list(data.fingerprints) == ["train", "validation", "test"]


def test_without_network(served: dict[tuple[str, str | None], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    after = r" \(HF_HUB_OFFLINE is set\), which failed: Couldn't reach [^\n]*; .*`data_dir` .*SPARSEPEFT_DATA"
    for task, call in (("rte", r"'nyu-mll/glue', 'rte'"), ("bbc-news", "'SetFit/bbc-news'")):
        with pytest.raises(TaskError, match=rf"^tried datasets\.load_dataset\({call}\){after}"):
            load_task(task)


def test_the_offline_switch_is_respected() -> None:
    # The real library; conftest sets offline.
    with pytest.raises(TaskError, match=r"tried .*'nobody/nothing'.*failed: "):
        load_splits("nobody/nothing", None, ["train"])


def test_what_the_hub_gives_must_fit(served: dict[tuple[str, str | None], Any]) -> None:
    served["nyu-mll/glue", "rte"] = DatasetDict(train=glue("rte")["train"])
    with pytest.raises(TaskError, match=r"has no split validation, only train"):
        load_task("rte")
    served["nyu-mll/glue", "rte"] = glue("cola")
    with pytest.raises(TaskError, match=r"no column sentence1, sentence2; found sentence, label, idx"):
        load_task("rte")
    hidden = glue("rte")
    hidden["validation"] = hidden["test"]
    served["nyu-mll/glue", "rte"] = hidden
    with pytest.raises(TaskError, match=r"rte, split validation from the hub: label -1; expected entailment"):
        load_task("rte")
