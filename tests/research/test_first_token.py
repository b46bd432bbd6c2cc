"""The experiment on what a backbone's first token says."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsepeft_research.experiments import first_token


@pytest.mark.filterwarnings("ignore:The fitted attributes of LogisticRegressionCV:FutureWarning")
def test_probes_of_the_first_token_and_of_the_mean(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "NUM_DRAWS", 2)
    found = first_token.measure(str(tiny_backbone), None, ["topics"])["results"]["topics"]
    for read in ("first", "mean"):
        assert 0 < found[read]["mean"] <= 1
        assert found[read]["std"] >= 0
        assert len(found["spread"][read]) == 3  # the embeddings and two layers
    assert found["spread"]["first"][0] == 0  # every text begins with the same token
