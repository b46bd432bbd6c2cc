"""How far exported answers are from PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest

from sparsepeft.export.checking import differences


def answers(scores: list[float]) -> list[dict[str, Any]]:
    return [{"label": "a", "scores": {"a": score, "b": 1 - score}} for score in scores]


def test_one_of_a_thousand_does_not_count_as_usual() -> None:
    found = differences(answers([0.5] * 1000), answers([0.5] * 998 + [0.501, 0.6]))
    assert found["max_deviation"] == pytest.approx(0.1)
    assert found["usual_deviation"] == pytest.approx(0.001)
    assert (found["num_texts"], found["num_other_labels"]) == (1000, 0)


@pytest.mark.parametrize("nothing", [[], [{"entities": []}]])
def test_nothing_to_compare(nothing: list[dict[str, Any]]) -> None:
    found = differences(nothing, nothing)
    assert found["max_deviation"] == found["usual_deviation"] == found["num_other_labels"] == 0
