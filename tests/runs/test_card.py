"""The model card of a run, and what is uploaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from tests.tiny import run_config, save_tiny_backbone, topics_rows, topics_text, write_jsonl

from sparsepeft.backbones import default_backbone, hub_id, public_name
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.methods.models import load_backbone
from sparsepeft.runs import pushing
from sparsepeft.runs.pushing import push_to_hub, shared_files
from sparsepeft.training import Predictor, RunConfig, train

SPT = {"num_blocks": 4, "num_active_blocks": 2, "top_l": 4}


def test_names_for_others(tiny_backbone: Path) -> None:
    assert hub_id("minilm") == hub_id(str(default_backbone())) == "sentence-transformers/all-MiniLM-L6-v2"
    cached = "/cache/hub/models--FacebookAI--roberta-base/snapshots/e2da8e2f811d1448a5b465c236feacd80ffbac7b"
    assert hub_id(cached) == hub_id("FacebookAI/roberta-base") == "FacebookAI/roberta-base"
    assert hub_id(str(tiny_backbone)) is None
    assert public_name(str(tiny_backbone)) == tiny_backbone.name


def _check(folder: Path, *hidden: Path) -> ModelCard:
    """Read a card as the hub does: its metadata survive a round trip, and it names no path."""
    card = ModelCard.load(folder / "README.md")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert [vars(each) for each in again.data.eval_results] == [vars(each) for each in card.data.eval_results]
    for path in hidden:
        assert str(path) not in str(card)
    assert "More Information Needed" not in str(card)
    return card


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spartan", "lora", "full", "sparse lora"])
def test_the_card_of_a_run_says_what_it_is_and_its_code_loads_it(tmp_path: Path, method: str) -> None:
    backbone, run = save_tiny_backbone(tmp_path / "tiny-bert"), tmp_path / "run"
    changes: dict[str, Any] = {"method": method.split()[-1], "spt": SPT if "sparse" in method else None}
    results = train(run_config(backbone, run, max_steps=2, **changes))
    card = _check(run, tmp_path)
    data = card.data
    assert (data.base_model, data.pipeline_tag, data.language) == ("tiny-bert", "text-classification", "en")
    assert data.library_name == ("transformers" if method == "full" else "peft")
    scores = {(each.dataset_split, each.metric_name): each.metric_value for each in data.eval_results}
    assert scores["test", "accuracy"] == pytest.approx(results["metrics"]["test"]["accuracy"], abs=1e-6)
    digest = results["data_fingerprints"]["test.jsonl"][7:]
    for words in ("| training | 270 |", "`learning_rate`", "By label, on test", digest):
        assert words in card.text
    assert ("--model path/to/tiny-bert" in card.text) == (method != "full")
    code = re.findall("```python\n(.*?)```", card.text, re.DOTALL)[0]
    namespace: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(run)).replace("path/to/tiny-bert", str(backbone)), namespace)
    inputs = {"input_ids": torch.arange(5, 15).reshape(1, -1)}
    with torch.no_grad():
        found = namespace["model"].eval()(**inputs).logits
        torch.testing.assert_close(found, Predictor(run).model(**inputs).logits)


@pytest.mark.slow
def test_saving_again_keeps_the_card_of_a_run(tmp_path: Path) -> None:
    backbone, run = save_tiny_backbone(tmp_path / "tiny-bert"), tmp_path / "run"
    train(run_config(backbone, run, max_steps=1))
    spec = Predictor(run).spec
    PeftModel.from_pretrained(load_backbone(str(backbone), spec), run).save_pretrained(run)
    card = _check(run, tmp_path)
    assert "By label, on test" in card.text
    assert card.text.count("## How to load") == 1
    assert card.text.index("## How to load") < card.text.index("## Data")


@pytest.mark.slow
def test_the_cards_of_regressions_and_language_models(tmp_path: Path, tiny_language_model: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "tiny-bert")
    rows = [{"a": row["text"], "b": "x", "y": len(row["text"]) / 10} for row in topics_rows("train")[:60]]
    own = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    file = write_jsonl(tmp_path / "mine.jsonl", rows)
    results = train(run_config(backbone, tmp_path / "run", task="custom", train_file=str(file), max_steps=1, **own))
    card = _check(tmp_path / "run", tmp_path)
    assert "gives a pair of texts a value" in card.text
    assert "on mine.jsonl" in card.text
    assert results["report"]["mae"] > 0
    assert results["baseline"]["metrics"]["mae"] > 0
    assert card.data.language is None

    text, short = (str(topics_text(tmp_path)),), {"max_steps": 1, "block_length": 16}
    train(RunConfig("lm", str(tmp_path / "lm"), model=str(tiny_language_model), text=text, **short))
    card = _check(tmp_path / "lm", tmp_path)
    assert (card.data.pipeline_tag, card.data.metrics) == ("text-generation", ["perplexity"])
    assert "AutoModelForCausalLM" in card.text


class Hub:
    """Stands in for ``HfApi``."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.private, self.files = error, None, {}

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        if self.error is not None:
            raise self.error
        self.private = private
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.mark.slow
def test_what_is_pushed_is_the_run_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, run = save_tiny_backbone(tmp_path / "tiny-bert"), tmp_path / "run"
    file = write_jsonl(tmp_path / "mine.jsonl", topics_rows("train")[:60])
    train(run_config(backbone, run, task="custom", train_file=str(file), max_steps=1))
    (run / "mine.txt").write_text("not the run's")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(RunFailed, match=r"not pushed to mine \(HF_HUB_OFFLINE is set\).*`sparsepeft push .*run mine`"):
        push_to_hub(run, "mine")
    monkeypatch.setattr(pushing.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(RunFailed, match="there is no token; log in"):
        push_to_hub(run, "mine")
    monkeypatch.setattr(pushing, "get_token", lambda: "hf_x")
    monkeypatch.setattr(pushing, "HfApi", lambda: Hub(OSError("403 Forbidden")))
    with pytest.raises(RunFailed, match="403 Forbidden"):
        push_to_hub(run, "mine", private=True)
    with pytest.raises(UserError, match="cannot be a repository's name"):
        push_to_hub(run, "a/b/c")
    hub = Hub()
    monkeypatch.setattr(pushing, "HfApi", lambda: hub)
    push_to_hub(run, "mine", private=True)
    assert hub.private is True
    assert hub.files.keys() == before.keys() - {"mine.txt", ".sparsepeft.json"}
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    config = json.loads(hub.files["run.json"])["config"]
    assert (config["model"], config["train_file"]) == ("tiny-bert", "mine.jsonl")
    assert "me/mine" in hub.files["README.md"].decode()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    (run / "README.md").write_text("---\nbase_model: /home/x\n---\n[More Information Needed]")  # of a former version
    assert b"By label" in shared_files(run, "mine")["README.md"]
