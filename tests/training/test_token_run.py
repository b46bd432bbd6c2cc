"""Labelled tokens from a file to answers: training, scores, files of answers, and an engine beside a task of texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.inference.test_sentences import byte_level
from tests.inference.test_token_tasks import _SIZES, ARCHITECTURES
from tests.tiny import Interrupt, run_config, save_tiny_backbone, topics_rows
from typer.testing import CliRunner

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.inspection import inspect_run
from sparsepeft.runs.files import RUN, spec_of
from sparsepeft.training import Predictor, evaluate, train
from sparsepeft_cli.app import app
from sparsepeft_cli.inspect import report_tables

pytestmark = pytest.mark.slow
KINDS = dict.fromkeys(("the", "a", "an"), "thing") | dict.fromkeys(("in", "of", "to", "for", "on", "at"), "place")
METHODS = ("spartan", "bitfit", "lora", "full")


def write_conll(path: Path, part: str, most: int = 400) -> Path:
    """The built-in sample's texts, in which articles and some prepositions are entities."""
    lines = []
    for row in topics_rows(part)[:most]:
        for word in row["text"].lower().replace(".", " .").split():
            lines.append(f"{word}\t{'B-' + KINDS[word] if word in KINDS else 'O'}\n")
        lines.append("\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("conll")
    return {part: write_conll(folder / f"{part}.conll", part) for part in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def runs(tiny_backbone: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method, with windows shorter than some sentences."""
    root = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        train(config(tiny_backbone, files, root / method, method=method))
    return {method: root / method for method in METHODS}


def config(backbone: Path, files: dict[str, Path], folder: Path, **changes: Any) -> Any:
    given = {f"{part}_file": str(path) for part, path in files.items()}
    values = {"task": "custom", "max_steps": 40, "learning_rate": 1e-2, "max_length": 20}
    return run_config(backbone, folder, **(values | given | changes))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_run_learns_and_says_so(runs: dict[str, Path]) -> None:
    results = results_of(runs["full"])
    assert (results["main_metric"], results["problem_type"]) == ("f1", "token_classification")
    assert results["metrics"]["test"].keys() == {"f1", "precision", "recall", "accuracy"}
    assert results["score"] > 0.5 > results["baseline"]["metrics"]["f1"] == 0
    assert results["baseline"]["answer"] == "O"
    assert results["report"]["per_class"].keys() == {"place", "thing"}
    assert results["num_rows"]["test"] == len(topics_rows("test"))
    assert any("longer than 20 tokens, read in parts: " in note for note in results["notes"])
    card = (runs["spartan"] / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "gives each token of a text one of 5 labels" in card
    assert "AutoModelForTokenClassification" in card
    spec = spec_of(json.loads((runs["spartan"] / RUN).read_text()))
    assert spec.label_names == ("O", "B-place", "I-place", "B-thing", "I-thing")


@pytest.mark.parametrize("method", ["spartan", "lora", "full"])
def test_scores_are_those_of_training(runs: dict[str, Path], files: dict[str, Path], method: str) -> None:
    results, scores = results_of(runs[method]), evaluate(runs[method])
    for part in ("validation", "test"):
        assert scores[part] == pytest.approx(results["metrics"][part], abs=2e-3)
    assert scores.num_rows == {name: results["num_rows"][name] for name in scores}
    assert any("read in parts" in note for note in scores.notes)
    of_file = evaluate(runs[method], test_file=files["test"])
    assert of_file["test"] == pytest.approx(scores["test"])
    assert of_file.report["test"]["per_class"]["place"]["support"] > 10


def test_an_engine_answers_as_each_run_alone(runs: dict[str, Path], tiny_backbone: Path, tmp_path: Path) -> None:
    train(run_config(tiny_backbone, tmp_path / "topics"))
    train(run_config(tiny_backbone, tmp_path / "lora topics", method="lora"))
    texts = [row["text"].lower() for row in topics_rows("test")[:6]]
    folders = {**runs, "topics": tmp_path / "topics", "lora topics": tmp_path / "lora topics"}
    engine = MultiTaskEngine(tiny_backbone, folders)
    assert engine.tasks["lora"].problem_type == "token_classification"
    assert engine.tasks["spartan"].max_length == 20
    answers = engine.predict([(name, text) for text in texts for name in folders], stride=4, on_error="raise")
    at_once = engine.predict_all([text[:40] for text in texts])
    for name, folder in folders.items():
        alone = Predictor(folder)
        expected = alone.predict(texts)
        for one, other in zip(answers[list(folders).index(name) :: len(folders)], expected, strict=True):
            if name.endswith("topics"):
                assert one.scores == pytest.approx(other.scores, abs=1e-5)
                continue
            assert not other.truncated
            found, wanted = one.entities or (), other.entities or ()
            assert [(each.label, each.start, each.end) for each in found] == [
                (each.label, each.start, each.end) for each in wanted
            ]
            assert [each.score for each in found] == pytest.approx([each.score for each in wanted], abs=1e-4)
        for text, one in zip(texts, at_once, strict=True):
            (other,) = alone.predict([text[:40]])
            assert [each.word for each in one[name].entities or ()] == [each.word for each in other.entities or ()]
    words = [entity for answer in answers for entity in answer.entities or ()]
    assert {entity.label for entity in words} == {"place", "thing"}
    assert all(entity.word for entity in words)


def test_files_of_answers(runs: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    ask = CliRunner()
    result = ask.invoke(app, ["predict", str(runs["full"]), "--file", str(files["test"])])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == len(topics_rows("test"))
    for row in rows:
        assert row["text"] == " ".join(row["tokens"])
        assert len(row["tags"]) == len(row["tokens"])
        assert all(row["text"][each["start"] : each["end"]] == each["word"] for each in row["entities"])
    lines = tmp_path / "lines.jsonl"
    tokens = rows[0]["tokens"]
    lines.write_text("".join(json.dumps(each) + "\n" for each in ({"tokens": tokens}, " ".join(tokens))))
    result = ask.invoke(app, ["predict", str(runs["full"]), "--file", str(lines)])
    assert [json.loads(line)["entities"] for line in result.stdout.splitlines()] == [rows[0]["entities"]] * 2
    bad = ([], ["a", " "], [1, 2], "a")
    lines.write_text("".join(json.dumps({"tokens": each}) + "\n" for each in bad))
    result = ask.invoke(app, ["predict", str(runs["full"]), "--file", str(lines)])
    errors = [json.loads(line).get("error", "") for line in result.stdout.splitlines()]
    words = (
        "pass a list of one text or more",
        "Token 2 of an input is ' '",
        "Token 1 of an input is 1; pass a text",
        "",
    )
    assert all(part in error for part, error in zip(words, errors, strict=True))
    untagged = tmp_path / "words.conll"
    untagged.write_text("\n".join(tokens) + "\n")
    out = tmp_path / "out.csv"
    ask.invoke(app, ["predict", str(runs["full"]), "--file", str(untagged), "--output", str(out)])
    header, line = out.read_text().splitlines()
    assert header == "tokens,text,entities,error"
    assert "start" in line
    shown = ask.invoke(app, ["evaluate", str(runs["full"]), "--report"]).stdout
    assert "f1" in shown
    assert "place" in shown
    iob1 = tmp_path / "iob1.conll"
    iob1.write_text(files["test"].read_text().replace("B-", "I-"))
    scores = evaluate(runs["full"], test_file=iob1)
    assert scores.metrics == evaluate(runs["full"], test_file=files["test"]).metrics
    assert [note for note in scores.notes if note.startswith("iob1.conll is in IOB1")]
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\na,b\n")
    with pytest.raises(UserError, match="which column has the tokens"):
        evaluate(runs["full"], test_file=texts)


def test_a_run_goes_on_where_it_stopped(tiny_backbone: Path, files: dict[str, Path], tmp_path: Path) -> None:
    values = {"method": "bitfit", "max_steps": 10, "eval_steps": 4, "class_weights": "balanced"}
    whole = train(config(tiny_backbone, files, tmp_path / "whole", **values))
    run = config(tiny_backbone, files, tmp_path / "run", **values)
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(6)])
    assert train(run)["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "precision": "bf16"},
        {"class_weights": {"B-place": 2.0}, "few_shot": 20},
        {"settings": {"layers_to_transform": [1]}, "cache_frozen_layers": True},
        {"spt": {"num_active_blocks": 0.5, "top_l": 8, "num_blocks": 4}},
        {"save_dtype": "int8", "max_train_samples": 50, "score_on": "selection"},
    ],
    ids=["smoothing", "weights", "cache", "sparse", "int8"],
)
def test_other_ways_to_train(
    tiny_backbone: Path, files: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    run = config(tiny_backbone, files, tmp_path / "run", **({"max_steps": 4} | options))
    results = train(run)
    assert 0 <= results["score"] <= 1
    if "spt" in options:
        engine = MultiTaskEngine(tiny_backbone, {"own": tmp_path / "run"})
        text = topics_rows("test")[0]["text"].lower()
        (answer,) = engine.predict([("own", text)], on_error="raise")
        assert answer.entities is not None
    if "class_weights" in options:
        with pytest.raises(UserError, match="B-huge"):
            train(config(tiny_backbone, files, tmp_path / "no", class_weights={"B-huge": 2.0}))


def test_batches_with_nothing_to_learn_are_left_out(tiny_backbone: Path, tmp_path: Path) -> None:
    """Of a token without pieces, and of the later pieces of a long one; a mean over nothing is no number."""
    lines = [f"the\tB-thing\nin\tO\n{'/'.join('abcdefgh' * 4)}\tO\n\n", "\u200b\tO\n\n", "of\tO\n\n"]
    (file := tmp_path / "a.conll").write_text("".join(lines * 12))
    files = {"train": file, "validation": file, "test": file}
    run = config(tiny_backbone, files, tmp_path / "run", batch_size=1, max_steps=30)
    assert 0 <= train(run)["score"] <= 1


def test_parents_by_the_tags_of_tokens(runs: dict[str, Path]) -> None:
    report = inspect_run(runs["spartan"], max_examples=30, compare_untrained=True)
    layer = report.layers[-1]
    layers = report_tables(report)[0]
    fresh = [float(row[list(layers.columns).index("untrained")]) for row in layers.rows]
    assert fresh == pytest.approx([each.nmi_positions for each in report.untrained.layers], abs=5e-4)
    assert report.label_names == ("O", "B-place", "I-place", "B-thing", "I-thing")
    assert layer.nmi_positions is not None
    assert layer.nmi_documents is None
    assert all(each.documents == 30 for each in report.layers)  # though some are read in parts
    counted = sum(sum((parent.labels_positions or {}).values()) for parent in layer.parents)
    assert 30 * 5 < counted < layer.positions


def test_a_tag_that_training_never_saw(runs: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs["spartan"], tmp_path / "copy"))
    run = json.loads((folder / RUN).read_text())
    foreign = files["train"].with_name("foreign.conll")
    foreign.write_text("a\tB-huge\nb\tO\n\n" * 5)
    run["config"]["test_file"] = str(foreign)
    (folder / RUN).write_text(json.dumps(run))
    with pytest.raises(UserError, match="B-huge"):
        evaluate(folder)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_other_architectures(architecture: str, files: dict[str, Path], tmp_path: Path) -> None:
    """A decoder with a byte-level tokenizer, and an encoder-decoder of which tokens see the encoder alone."""
    backbone = save_tiny_backbone(tmp_path / "backbone", build=ARCHITECTURES[architecture], **_SIZES)
    if architecture == "gpt2":
        tokenizer = byte_level()
        tokenizer.model_max_length = 64
        tokenizer.save_pretrained(backbone)
    for method in ("spartan", "lora"):
        train(config(backbone, files, tmp_path / method, method=method, max_steps=2, max_train_samples=30))
    engine = MultiTaskEngine(backbone, {method: tmp_path / method for method in ("spartan", "lora")})
    for method in engine.tasks:
        alone = Predictor(tmp_path / method)
        encoded = alone.tokenizer(topics_rows("test")[0]["text"].lower(), truncation=True, max_length=20)
        inputs = [{name: list(values) for name, values in encoded.items()}]
        (found,), (expected,) = engine.token_logits(method, inputs), alone.token_logits(inputs)
        assert found.shape == (len(inputs[0]["input_ids"]), 5)
        np.testing.assert_allclose(found, expected, atol=1e-5)
