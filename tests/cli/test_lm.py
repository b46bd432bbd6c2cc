"""Language models from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.test_cli import sparsepeft
from tests.tiny import topics_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return topics_text(tmp_path_factory.mktemp("text"))


SPT = ("--spt-set", "num_blocks=4", "--spt-set", "num_active_blocks=2", "--spt-set", "top_l=0.25")


def test_train_evaluate_predict(tiny_language_model: Path, text: Path, tmp_path: Path) -> None:
    command = ("train", "--task", "lm", "--model", tiny_language_model, "--text", text, "--output-dir", tmp_path / "o")
    short = ("--max-steps", 4, "--block-length", 32, "--batch-size", 4, "--learning-rate", 0.01, "--spt", *SPT)
    done = sparsepeft(*command, *short, "--gradient-checkpointing", "--gradient-accumulation", 2)
    assert done.returncode == 0, done.stderr
    for words in (
        "recall",
        "model.layers.1",
        "8 keys for each query",
        "2 of 4 blocks",
        "perplexity",
        "in the routers",
        "[CLS]",
    ):
        assert words in done.stdout
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["spt"]["config"]["num_active_blocks"] == 2
    assert results["config"]["gradient_accumulation_steps"] == 2

    done = sparsepeft("evaluate", tmp_path / "o", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["validation"]["perplexity"] == pytest.approx(results["score"], rel=1e-5)
    assert f"{results['score']:.4f}" in sparsepeft("evaluate", tmp_path / "o").stdout

    done = sparsepeft("predict", tmp_path / "o", "some text")
    assert done.returncode == 2
    assert "`sparsepeft generate`" in done.stderr
    (tmp_path / "prompts.txt").write_text('the team won\n{"prompt": "the striker"}\n')
    arguments = ("generate", tmp_path / "o", "--max-new-tokens", 5)
    done = sparsepeft(*arguments, "--file", tmp_path / "prompts.txt", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the team won", "the striker"]
    done = sparsepeft(*arguments, "the striker")
    assert done.stdout == f"the striker{lines[1]['generated_text']}\n", done.stderr
    done = sparsepeft(*arguments, "the striker", "--temperature", 0.5)
    assert done.returncode == 2
    assert "--temperature 0.5 was given, but without --do-sample" in done.stderr
    (tmp_path / "prompts.txt").write_text("the team won\n\nthe striker\n")
    for file, words in ((tmp_path, "is a folder"), (tmp_path / "prompts.txt", "line 2 is empty")):
        done = sparsepeft(*arguments, "--file", file)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())


def test_config_file_and_json(tiny_language_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: lm\nmodel: {tiny_language_model}\ntext: [{text}]\nvalidation_text: {text}\nmax_steps: 1\n"
        "block_length: 16\nspt: {num_blocks: 4, num_active_blocks: 1, attention: false}\nsettings: {r: 2}\n"
    )
    arguments = ("--config", file, "--output-dir", tmp_path / "o", "--set", "lora_alpha=2", "--spt-set", "num_blocks=8")
    done = sparsepeft("train", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((tmp_path / "o" / "results.json").read_text())
    assert results["config"]["settings"] == {"r": 2, "lora_alpha": 2}
    assert results["config"]["spt"] == {"num_blocks": 8, "num_active_blocks": 1, "attention": False}
    assert results["notes"] == ["the validation text is trained on, too: its perplexity says nothing about new text"]


def test_sparsify(tiny_language_model: Path, text: Path, tmp_path: Path) -> None:
    settings = ("--set", "num_blocks=4", "--set", "num_active_blocks=3", "--block-length", 32)
    command = ("sparsify", tiny_language_model, "--text", text, "--output-dir", tmp_path / "o", *settings)
    done = sparsepeft(*command)
    assert done.returncode == 0, done.stderr
    for words in ("recall", "attention error", "FFN error", "model.layers.0", "3 of 4 blocks", "perplexity"):
        assert words in done.stdout
    content = json.loads((tmp_path / "o" / "spt.json").read_text())
    assert content["config"]["top_l"] == 4  # an eighth of the blocks' length, as a count
    again = sparsepeft(*command)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    done = sparsepeft(*command, "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    for key in ("config", "report", "perplexity"):
        assert json.loads(done.stdout)[key] == content[key]


BAD_TRAIN = {
    "text without lm": (["--task", "topics", "--text", "{text}"], ["--text goes", "--task lm only", "'topics'"]),
    "spt-set without spt or lm": (["--task", "topics", "--spt-set", "top_l=3"], ["--spt-set", "--spt "]),
    "block length without a task": (["--block-length", "3"], ["--block-length", "--task lm only"]),
    "spt-set without spt": (["--task", "lm", "--text", "{text}", "--spt-set", "top_l=3"], ["--spt-set", "--spt "]),
    "few shots": (["--task", "lm", "--text", "{text}", "--few-shot", "3"], ["--few-shot", "--task lm"]),
    "no text": (["--task", "lm"], ["--text"]),
    "no such file": (["--task", "lm", "--text", "{text}.none"], ["topics.txt.none"]),
    "unknown spt key": (
        ["--task", "lm", "--text", "{text}", "--spt", "--spt-set", "num_block=3"],
        ["num_block", "did you mean 'num_blocks'"],
    ),
    "malformed spt key": (
        ["--task", "lm", "--text", "{text}", "--spt", "--spt-set", "top_l"],
        ["--spt-set", "key=val"],
    ),
    "a head": (["--task", "lm", "--text", "{text}", "--method", "head"], ["head", "lora"]),
    "full and sparse": (["--task", "lm", "--text", "{text}", "--method", "full", "--spt"], ["full", "lora"]),
}
BAD_SPARSIFY = {
    "no text": ([], ["pass --text", "attention=false"]),
    "unknown key": (["--text", "{text}", "--set", "topl=3"], ["topl", "did you mean 'top_l'"]),
    "too short": (["--text", "{text}.short", "--block-length", "32"], ["less than one block of 32"]),
}


@pytest.mark.parametrize(
    ("command", "case"), [("train", case) for case in BAD_TRAIN] + [("sparsify", case) for case in BAD_SPARSIFY]
)
def test_bad_input_ends_with_2_and_one_sentence(
    command: str, case: str, tiny_language_model: Path, text: Path, tmp_path: Path
) -> None:
    Path(f"{text}.short.txt").write_text("the team won")
    arguments, words = (BAD_TRAIN if command == "train" else BAD_SPARSIFY)[case]
    given = [
        argument.replace("{text}.short", f"{text}.short.txt").replace("{text}", str(text)) for argument in arguments
    ]
    model = ["--model", tiny_language_model] if command == "train" else [tiny_language_model]
    done = sparsepeft(command, *model, *given, "--output-dir", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip() and line != "converting"]
    assert line.startswith("Error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path, text: Path) -> None:
    import transformers as hf
    from tests.spt.models import build
    from tests.tiny import save_tiny_backbone

    folder = save_tiny_backbone(tmp_path / "t5", build=lambda **config: hf.T5Model(build("t5").config))
    done = sparsepeft("sparsify", folder, "--text", text, "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert "t5" in done.stderr
    assert "causal or masked language model" in done.stderr
