"""Scores on held-out training data, for choosing hyperparameters: the validation set is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import run_config, topics_rows, write_jsonl

from sparsepeft.training import train
from sparsepeft.training.data import RunData, prepare_data


def _prepare(backbone: Path, folder: Path, **changes: Any) -> RunData:
    return prepare_data(run_config(backbone, folder, **changes))


def _texts(dataset: Any) -> set[tuple[int, ...]]:
    return {tuple(ids) for ids in dataset["input_ids"]}


@pytest.mark.parametrize("protocol", [{"few_shot": 150}, {}, {"max_train_samples": 100}])
def test_what_is_scored_is_neither_trained_on_nor_the_validation_set(
    tiny_backbone: Path, tmp_path: Path, protocol: dict[str, int]
) -> None:
    whole = _prepare(tiny_backbone, tmp_path)
    validation = _texts(whole.reported["validation"])
    assert len(_texts(whole.train)) == len(whole.train)  # the texts differ, so that overlaps would be seen
    assert len(whole.train) + len(whole.selection) == len(topics_rows("train"))
    draws, scored = [], []
    for seed in range(2):
        data = _prepare(tiny_backbone, tmp_path, score_on="selection", seed=seed, **protocol)
        assert data.reported.keys() == {"selection"}
        draws.append(_texts(data.train))
        scored.append(_texts(data.reported["selection"]))
        assert not draws[-1] & scored[-1]
        assert not scored[-1] & validation
        assert len(data.train) == protocol.get("few_shot", len(data.train))
        assert (data.selection is None) == ("few_shot" in protocol)
    assert all(texts == scored[0] for texts in scored)  # the same in every run, or points could not be compared
    assert (len({frozenset(draw) for draw in draws}) > 1) == ("few_shot" in protocol)


def test_without_it_a_few_shot_draw_may_use_all_training_data(tiny_backbone: Path, tmp_path: Path) -> None:
    num_train = len(topics_rows("train"))
    data = _prepare(tiny_backbone, tmp_path, few_shot=num_train)
    assert len(data.train) == num_train
    assert data.reported.keys() == {"validation", "test"}
    with pytest.raises(ValueError, match=f"{num_train} examples asked for"):
        _prepare(tiny_backbone, tmp_path, few_shot=num_train, score_on="selection")


@pytest.mark.slow
def test_no_score_of_the_validation_set_is_computed(tiny_backbone: Path, tmp_path: Path) -> None:
    """Its labels are turned round here: a score that had seen them would change, a checkpoint could be another."""
    rows = topics_rows("validation")
    labels = sorted({row["label"] for row in rows})
    turned = [row | {"label": labels[labels.index(row["label"]) - 1]} for row in rows]
    files = {"train_file": str(write_jsonl(tmp_path / "train.jsonl", topics_rows("train")))}
    results = {}
    for name, validation in (("given", rows), ("turned", turned)):
        files["validation_file"] = str(write_jsonl(tmp_path / f"{name}.jsonl", validation))
        values: dict[str, Any] = {"score_on": "selection", "max_train_samples": 60, "max_steps": 4}
        results[name] = train(run_config(tiny_backbone, tmp_path / name, task="custom", **values, **files))
        assert results[name]["metrics"].keys() == {"selection"}
        assert results[name]["score_split"] == "selection"
        assert results[name]["score"] == results[name]["metrics"]["selection"][results[name]["main_metric"]]
    for key in ("metrics", "score", "best_step", "selection_score"):
        assert results["given"][key] == results["turned"][key]
