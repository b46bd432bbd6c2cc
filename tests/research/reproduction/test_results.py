"""Which result files count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.matrices import hand_made_result, hand_made_run

from sparsepeft_research.reproduction import plan
from sparsepeft_research.reproduction.results import find_result, read_error, write_result


def test_a_runs_own_result_counts_also_from_before_a_field_with_a_default(tmp_path: Path) -> None:
    run = hand_made_run(tmp_path, "rte", "spartan", 1)
    assert find_result(run).result is None
    result = hand_made_result(run, 0.5)
    assert find_result(run).result == result
    del result["config"]["compile"], result["reproduction"]["recipe"]["max_grad_norm"]
    run.result_file.write_text(json.dumps(result))
    assert find_result(run).problem is None


def test_a_recipe_that_was_given_in_another_way_is_the_same_run(tmp_path: Path) -> None:
    run = hand_made_run(tmp_path, "rte", "lora", 1)
    given = dataclasses.replace(run.config, learning_rate=run.config.recipe_values().learning_rate)
    hand_made_result(dataclasses.replace(run, config=given), 0.5)
    assert find_result(run).problem is None
    changed = dataclasses.replace(run.config, settings={"r": 3})
    assert "adapter" in (find_result(dataclasses.replace(run, config=changed)).problem or "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"score": "0.5"}, "its score is '0.5'"),
        ({"format_version": 0}, "format version 0"),
        ({"model": "another"}, "the model another"),
        ({"data_fingerprints": {"train.tsv": "sha256:1"}}, "other data files"),
        ({"config": {"task": "rte"}}, "other values of epochs, method, recipe, seed"),
        ({"config": 3}, "all values"),
        ({"reproduction": {"recipe": {"learning_rate": 0.5}}}, "learning_rate"),
        ({"reproduction": None}, "all values"),
        ('{"task": "rte"', "damaged"),
        ("[1]", "list"),
        ('{"task": "rte"}', "lacks format_version"),
        ("", "damaged"),
        ("\ud800", "damaged"),
    ],
)
def test_a_foreign_or_damaged_file_does_not_count_and_says_why(
    tmp_path: Path, content: dict[str, Any] | str, words: str
) -> None:
    run = hand_made_run(tmp_path, "rte", "spartan", 1)
    if isinstance(content, dict):
        hand_made_result(run, 0.5, **content)
    else:
        run.result_file.write_bytes(content.encode(errors="surrogatepass"))
    found = find_result(run)
    assert found.result is None
    assert words in (found.problem or "")
    (planned,) = plan([run])
    assert (planned.state, planned.detail) == ("stale", found.problem)


def test_a_file_that_does_not_count_is_moved_aside_not_overwritten(tmp_path: Path) -> None:
    run = hand_made_run(tmp_path, "rte", "spartan", 1)
    for content in ("first", "second"):
        run.result_file.write_text(content)
        write_result(run, {"new": content})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["rte-spartan-1.json", "rte-spartan-1.json.stale-1", "rte-spartan-1.json.stale-2"]
    assert (tmp_path / kept[1]).read_text() == "first"
    assert json.loads(run.result_file.read_text()) == {"new": "second"}


def test_a_damaged_error_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.error.json").write_text("{")
    assert "a.error.json is damaged" in read_error(tmp_path / "a.error.json")["message"]
