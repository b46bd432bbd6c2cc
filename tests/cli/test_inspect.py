"""``sparsepeft inspect`` as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran

pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "sparsepeft[plots]"')
pytestmark = pytest.mark.slow


def test_inspect(topics_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "inspection"
    done = ran("inspect", topics_run, "--output-dir", output, "--compare-untrained")
    for words in ("120 documents", "parents of bert.encoder.layer.1", "untrained", "purity", str(output)):
        assert words in done.stdout
    assert (output / "inspection.html").is_file()
    done = ran("inspect", topics_run, "--json", "--layer", 0, "--split", "validation", "--max-examples", 12)
    report = json.loads(done.stdout)
    assert [layer["name"] for layer in report["layers"]] == ["bert.encoder.layer.0"]
    assert report["source"]["examples"] == 12
    assert len(report["layers"][0]["parents"]) == 4
