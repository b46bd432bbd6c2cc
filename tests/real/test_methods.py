"""Every method on the real models: attached, trained, saved, read in another process, taken off again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tests.real.models import GEMMA, METHODS, MPNET, SUPPORTED, Rows, Trained, batch_of, classifier

from sparsepeft.tasks import TaskData

pytestmark = pytest.mark.real
Train = Callable[[str, str], Trained]


@pytest.mark.parametrize(("name", "method"), SUPPORTED)
def test_the_loss_falls_and_the_backbone_is_left_as_it_was(name: str, method: str, trained: Train) -> None:
    done = trained(name, method)
    before, after = done.losses
    assert after < 0.9 * before
    if method == "lora":  # of which PEFT leaves the trained head in place
        assert all(tensor.startswith(("classifier.", "score.")) for tensor in done.changed)
    else:
        assert done.changed == []


@pytest.mark.parametrize("name", [MPNET, GEMMA])
def test_another_process_gives_the_same_logits(
    name: str, trained: Train, rows: Rows, news: TaskData, tmp_path: Path
) -> None:
    expected = {method: trained(name, method) for supported, method in SUPPORTED if supported == name}
    save_file(batch_of(name, rows), tmp_path / "batch")
    arguments = [name, news.spec.num_labels, tmp_path / "batch", tmp_path / "logits"]
    folders = [done.folder for done in expected.values()]
    command = [sys.executable, "-m", "tests.real.answers", *map(str, arguments + folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits")
    assert [method for method in expected if not torch.equal(found[method], expected[method].logits)] == []


def test_bitfit_finds_no_biases_in_gemma(news: TaskData) -> None:
    with pytest.raises(ValueError, match="has no biases that BitFit could train"):
        get_peft_model(classifier(GEMMA, news.spec.num_labels), METHODS["bitfit"](GEMMA))
