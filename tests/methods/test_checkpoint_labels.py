"""Checkpoints that were fine-tuned as classifiers: their head's rows are matched to a task's labels by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.tiny import run_config, save_tiny_backbone

from sparsepeft.methods.checkpoint_labels import HeadStart, head_start
from sparsepeft.methods.models import extend, load_backbone, note_on_head
from sparsepeft.tasks import TaskSpec, task_spec
from sparsepeft.training import train

NLI = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


@pytest.mark.parametrize(
    ("checkpoint", "task", "rows"),
    [
        (NLI, ("entailment", "neutral", "contradiction"), (2, 1, 0)),
        (NLI, ("contradiction", "neutral", "entailment"), None),
        (("not-entailment", "entailment"), ("entailment", "not_entailment"), (1, 0)),
        (("low", "high", "mid"), ("high", "low"), (1, 0)),
        (("1", "0"), ("0", "1"), (1, 0)),
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), None),
        (("NEGATIVE", "POSITIVE"), ("0", "1"), None),
        (("similarity",), None, None),
    ],
)
def test_rows_by_name(checkpoint: Sequence[str], task: Sequence[str] | None, rows: tuple[int, ...] | None) -> None:
    assert head_start(dict(enumerate(checkpoint)), task) == HeadStart(rows)


def _checkpoint(folder: Path, kind: str, labels: Sequence[str]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    encoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sides = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("attention_heads", 2))
    }
    sizes: dict[str, dict[str, Any]] = {
        "bert": encoder,
        "roberta": encoder,
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        "bart": {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **sides},
    }
    names = dict(enumerate(labels))
    config = hf.AutoConfig.for_model(kind, vocab_size=64, pad_token_id=1, id2label=names, **sizes[kind])
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "bart"])
def test_a_fresh_adapter_answers_as_the_checkpoint(tmp_path: Path, kind: str) -> None:
    checkpoint = _checkpoint(tmp_path, kind, NLI)
    ids = torch.randint(5, 60, (4, 8))
    ids[:, -1] = 2  # where BART's head looks
    expected = checkpoint(input_ids=ids).logits
    for task, rows in ((task_spec("mnli"), [2, 1, 0]), (_two_labels(), [0, 2])):
        for method in ("spartan", "full"):
            model = extend(load_backbone(str(tmp_path), task), method, task, {}).eval()
            torch.testing.assert_close(model(input_ids=ids).logits, expected[:, rows], rtol=1e-4, atol=1e-5)
            loss = model(input_ids=ids, labels=torch.tensor([0, 1, 1, 0])).loss
            assert loss.isfinite()
            assert model.config.id2label == dict(enumerate(task.label_names or ()))
        assert note_on_head(str(tmp_path), task) == ()


def _two_labels() -> TaskSpec:
    return dataclasses.replace(task_spec("rte"), label_names=("contradiction", "entailment"))


def test_other_labels_get_a_fresh_head_and_a_note(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, "bert", ("toxic", "neutral", "other"))
    spec = task_spec("mnli")
    fresh = load_backbone(str(tmp_path), spec).classifier.weight
    assert not torch.isclose(fresh, checkpoint.classifier.weight, atol=1e-3).any(dim=1).all()
    assert fresh.std() < 0.05
    (note,) = note_on_head(str(tmp_path), spec)
    assert "trained for other labels (toxic, neutral, other)" in note


@pytest.mark.slow
def test_the_note_is_in_the_results(tmp_path: Path) -> None:
    names = dict(enumerate("vwxyz"))
    backbone = save_tiny_backbone(
        tmp_path / "base",
        build=lambda **config: hf.BertForSequenceClassification(hf.BertConfig(id2label=names, **config)),
    )
    notes = train(run_config(backbone, tmp_path / "out", max_steps=1))["notes"]
    assert any("other labels (v, w, x, y, z)" in note for note in notes)
