"""Language models from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused, sparsepeft
from tests.tiny import topics_text

from sparsepeft.scoring import evaluation
from sparsepeft.training import model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topics_text(tmp_path_factory.mktemp("text"))


SPT = (
    "--spt-set",
    "values=routed",
    "--spt-set",
    "num_blocks=4",
    "--spt-set",
    "num_active_blocks=2",
    "--spt-set",
    "top_l=0.25",
)


def test_train_evaluate_predict(
    tiny_language_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "is_onednn_faster", lambda dtype: False)  # whose last digits are others than evaluate's
    command = ("train", "--task", "lm", "--model", tiny_language_model, "--text", text, "--output-dir", tmp_path / "o")
    short = ("--max-steps", 4, "--block-length", 32, "--batch-size", 4, "--learning-rate", 0.01, "--spt", *SPT)
    done = ran(*command, *short, "--gradient-checkpointing", "--gradient-accumulation", 2)
    for words in (
        "recall",
        "model.layers.1",
        "8 keys for each query",
        "2 of 4 blocks",
        "perplexity",
        "in the routers",
        "perplexity by how the model answers: sparse",
        "[CLS]",
    ):
        assert words in done.stdout
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["spt"]["config"]["num_active_blocks"] == 2
    assert results["config"]["gradient_accumulation_steps"] == 2

    done = ran("evaluate", tmp_path / "o", "--json")
    assert json.loads(done.stdout)["validation"]["perplexity"] == pytest.approx(results["score"], rel=1e-5)
    scores = {infer: metrics["validation"]["perplexity"] for infer, metrics in results["metrics_by_infer"].items()}
    assert scores["sparse"] == results["score"] != scores["dense"]
    perplexity, sizes = evaluation.perplexity, set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "perplexity", lambda *given: (sizes.add(given[2]), perplexity(*given))[1])
        done = ran("evaluate", tmp_path / "o", "--batch-size", 3, "--report")
        assert "this task has none" in done.stderr
        ran("evaluate", tmp_path / "o")
    assert sizes == {3, 4}
    shown = sparsepeft("evaluate", tmp_path / "o").stdout
    assert all(f"{score:.4f}" in shown and f"validation, {infer}" in shown for infer, score in scores.items())
    shown = sparsepeft("evaluate", tmp_path / "o", "--infer", "dense").stdout
    assert f"{scores['dense']:.4f}" in shown
    assert f"{scores['sparse']:.4f}" not in shown

    refused("predict", tmp_path / "o", "some text", words="`sparsepeft generate`")
    refused("evaluate", tmp_path / "o", "--test-file", text, "--label-column", "label", words="a language model")
    (tmp_path / "prompts.txt").write_text('the team won\n{"prompt": "the striker"}\n')
    arguments = ("generate", tmp_path / "o", "--max-new-tokens", 5)
    done = ran(*arguments, "--file", tmp_path / "prompts.txt", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the team won", "the striker"]
    assert ran(*arguments, "the striker", "--infer", "dense").stdout.startswith("the striker")
    done = sparsepeft(*arguments, "the striker")
    assert done.stdout == f"the striker{lines[1]['generated_text']}\n", done.stderr
    refused(
        *arguments, "the striker", "--temperature", 0.5, words="--temperature 0.5 was given, but without --do-sample"
    )
    (tmp_path / "prompts.txt").write_text("the team won\n\nthe striker\n")
    for file, words in ((tmp_path, "is a folder"), (tmp_path / "prompts.txt", "line 2 is empty")):
        refused(*arguments, "--file", file, words=words)


def test_config_file_and_json(tiny_language_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: lm\nmodel: {tiny_language_model}\ntext: [{text}]\nvalidation_text: {text}\nmax_steps: 1\n"
        "block_length: 16\nspt: {num_blocks: 4, num_active_blocks: 1, attention: false}\nsettings: {r: 2}\n"
    )
    arguments = ("--config", file, "--output-dir", tmp_path / "o", "--set", "lora_alpha=2", "--spt-set", "num_blocks=8")
    done = ran("train", *arguments, "--json")
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["config"]["settings"] == {"r": 2, "lora_alpha": 2}
    assert results["config"]["spt"] == {"num_blocks": 8, "num_active_blocks": 1, "attention": False}
    assert results["notes"] == ["the validation text is trained on, too: its perplexity says nothing about new text"]


def test_sparsify(tiny_language_model: Path, text: Path, tmp_path: Path) -> None:
    settings = ("--set", "num_blocks=4", "--set", "num_active_blocks=3", "--block-length", 32)
    command = ("sparsify", tiny_language_model, "--text", text, "--output-dir", tmp_path / "o", *settings)
    done = ran(*command)
    for words in ("recall", "attention error", "FFN error", "model.layers.0", "3 of 4 blocks", "perplexity"):
        assert words in done.stdout
    content = json.loads((tmp_path / "o" / "spt.json").read_text())
    assert content["config"]["top_l"] == 4  # an eighth of the blocks' length, as a count
    assert content["plan"] is None
    refused(*command, words="--overwrite")
    done = ran(*command, "--overwrite", "--json")
    for key in ("config", "report", "perplexity"):
        assert json.loads(done.stdout)[key] == content[key]
    done = ran(*command, "--set", "infer=dense", "--overwrite", "--json")
    assert json.loads(done.stdout)["perplexity"] == content["perplexity"]
    done = ran(*command, "--overwrite", "--budget", "5%")
    for words in ("becomes", "model.layers.0.mlp", "of 5.00% allowed", "held out text", "of the dense time"):
        assert words in done.stdout
