"""Runs of every method in one engine: each is answered as by itself, and the backbone's weights exist once."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.inference.test_engine import TEXTS, alone, values
from tests.inference.test_sparse_backbone import sparse_backbone
from tests.tiny import run_config, save_tiny_backbone, save_tiny_language_model, topics_rows, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsepeft import MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.export.tasks import read_tasks
from sparsepeft.inference import Predictor
from sparsepeft.inference.views import View
from sparsepeft.methods.language_models import load_language_model
from sparsepeft.training import train

SPT = {"top_l": 4, "num_blocks": 4, "num_active_blocks": 2}
LENGTHS = {"spartan": 16, "full": 20}  # the others take as many tokens as the backbone
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("spartan", "pfeiffer", "bitfit", "head", "lora", "ia3", "full")},
    "sparse": {"method": "spartan", "spt": SPT},
    "sparse lora": {"method": "lora", "spt": SPT},
}
OWN = ("lora", "ia3", "full", "sparse", "sparse lora")


@pytest.fixture(scope="module")
def runs(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind of task, of a few steps."""
    root = tmp_path_factory.mktemp("runs")
    for name, changes in RUNS.items():
        options = {"max_steps": 2, "max_train_samples": 40, "score_on": "selection", "max_length": LENGTHS.get(name)}
        train(run_config(backbone, root / name, **(options | changes)))
    sample = topics_rows("train")[:60]
    rows = [{"a": one["text"], "b": sample[0]["text"], "label": one["label"]} for one in sample]
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "label"}
    file = {"task": "custom", "train_file": str(write_jsonl(root / "pairs.jsonl", rows))}
    train(run_config(backbone, root / "pairs", method="lora", max_steps=2, **file, **columns))
    return {name: root / name for name in (*RUNS, "pairs")}


@pytest.fixture(scope="module")
def engine(backbone: Path, runs: dict[str, Path]) -> MultiTaskEngine:
    return MultiTaskEngine(backbone, runs, token_budget=128, onednn=False)


@pytest.fixture(scope="module")
def expected(runs: dict[str, Path]) -> dict[str, list[Any]]:
    """What each run answers by itself."""
    return {name: Predictor(folder, batch_size=1).predict(inputs(name)) for name, folder in runs.items()}


def inputs(name: str) -> list[Any]:
    return list(pairwise(TEXTS[:6])) if name == "pairs" else TEXTS[:5]


def check(engine: MultiTaskEngine, expected: dict[str, list[Any]], names: Iterable[str]) -> None:
    """Each row of one call is answered as the run does by itself; tasks and lengths are interleaved."""
    places = [(name, place) for place in range(5) for name in names]
    answers = engine.predict([(name, inputs(name)[place]) for name, place in places], on_error="raise")
    for one, (name, place) in zip(answers, places, strict=True):
        other = expected[name][place]
        np.testing.assert_allclose(values(one), values(other), rtol=1e-4, atol=1e-5)
        assert (one.label, one.truncated) == (other.label, other.truncated)


def test_every_kind_of_run_in_one_call(
    engine: MultiTaskEngine, expected: dict[str, list[Any]], runs: dict[str, Path], backbone: Path
) -> None:
    check(engine, expected, runs)
    assert {one.truncated for one in expected["spartan"]} == {False, True}
    for answers, of_text in zip(engine.predict_all(TEXTS[:5]), range(5), strict=True):
        assert list(answers) == list(RUNS)  # the pairs' task takes none of the texts
        for name, one in answers.items():
            np.testing.assert_allclose(values(one), values(expected[name][of_text]), rtol=1e-4, atol=1e-5)
    (of_pair,) = engine.predict_all([(TEXTS[0], TEXTS[1])])
    assert list(of_pair) == ["pairs"]
    np.testing.assert_allclose(values(of_pair["pairs"]), values(expected["pairs"][0]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values(expected["pfeiffer"][0]), alone(backbone, runs["pfeiffer"], TEXTS[0]), atol=1e-5)
    refused = engine.predict([(name, max(TEXTS, key=len)) for name in ("spartan", "full", "lora")], truncation=False)
    assert "longer than the 16 tokens" in str(refused[0].error)
    assert "longer than the 20 tokens" in str(refused[1].error)
    assert refused[2].error is None


def test_weights_are_shared_and_nothing_of_the_backbone_changes(
    engine: MultiTaskEngine, expected: dict[str, list[Any]], runs: dict[str, Path], backbone: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    mine = MultiTaskEngine(model, {name: runs[name] for name in OWN}, tokenizer=tokenizer, onednn=True)
    check(mine, expected, OWN)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if name.startswith("bert.")}
    routed = {name for name in places if re.search(r"\d\.(intermediate|output)\.dense", name)}  # in another order
    for name, task in mine._tasks.now().items():
        assert type(task.view) is View
        found = {tensor.data_ptr() for tensor in task.view.model.state_dict().values()}
        copied = {each for each, place in places.items() if place not in found}
        assert copied == (places.keys() if name == "full" else routed if "sparse" in name else set())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_runs_come_and_go(backbone: Path, runs: dict[str, Path], expected: dict[str, list[Any]]) -> None:
    engine = MultiTaskEngine(backbone, {"spartan": runs["spartan"]})
    for name in OWN:
        engine.add(name, runs[name])
    view = weakref.ref(engine._tasks.now()["full"].view)
    engine.replace("full", runs["lora"])
    gc.collect()
    assert view() is None
    check(engine, expected | {"full": expected["lora"]}, ["spartan", *OWN])
    for name in OWN:
        engine.remove(name)
    check(engine, expected, ["spartan"])
    assert list(engine.tasks) == ["spartan"]


def test_bfloat16_is_near(backbone: Path, runs: dict[str, Path], expected: dict[str, list[Any]]) -> None:
    engine = MultiTaskEngine(backbone, {name: runs[name] for name in OWN}, dtype="bf16")
    for name in OWN:
        found = [values(one) for one in engine.predict([(name, text) for text in TEXTS[:5]], on_error="raise")]
        np.testing.assert_allclose(found, [values(one) for one in expected[name]], atol=0.05)


def test_a_predictor_reads_inputs_and_batches(runs: dict[str, Path], expected: dict[str, list[Any]]) -> None:
    predictor = Predictor(runs["lora"], batch_size=3)
    for one, other in zip(predictor.predict(TEXTS[:5]), expected["lora"], strict=True):
        np.testing.assert_allclose(values(one), values(other), rtol=1e-4, atol=1e-5)
    for given in (TEXTS[0], {"text": TEXTS[0]}, [(TEXTS[0],)]):
        (one,) = predictor.predict(given)  # type: ignore[arg-type]
        np.testing.assert_allclose(values(one), values(expected["lora"][0]), rtol=1e-4, atol=1e-5)
    assert predictor.predict([]) == []
    assert predictor.logits([]).shape == (0, 5)


# -- bad runs ------------------------------------------------------------------------------------------------------


def _changed(folder: Path, target: Path, change: Any) -> Path:
    shutil.copytree(folder, target)
    run = json.loads((target / "run.json").read_text())
    change(run)
    (target / "run.json").write_text(json.dumps(run))
    return target


def test_bad_runs_are_refused(
    engine: MultiTaskEngine, runs: dict[str, Path], expected: dict[str, list[Any]], tmp_path: Path
) -> None:
    fewer = _changed(runs["spartan"], tmp_path / "fewer", lambda run: run["task"]["label_names"].pop())
    cut = tmp_path / "cut"
    shutil.copytree(runs["full"], cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    empty = _changed(runs["lora"], tmp_path / "empty", lambda run: None)
    (empty / "adapter_model.safetensors").unlink()
    unfinished = tmp_path / "unfinished run"
    shutil.copytree(runs["lora"], unfinished / "unfinished")
    for folder, words in (
        (fewer, r"4 label\(s\), but the head has 5"),
        (cut, "could not be loaded"),
        (empty, "holds no trained weights yet; finish its training"),
        (unfinished, "holds no trained weights yet; finish its training"),
    ):
        with pytest.raises(UserError, match=words):
            engine.add("bad", folder)
    other = MultiTaskEngine(save_tiny_backbone(tmp_path / "other", seed=3))
    for name in ("lora", "sparse", "spartan"):
        with pytest.raises(UserError, match="backbone"):
            other.add("bad", runs[name])
    check(engine, expected, runs)


def _without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def _not_finite(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * float("nan") if "classifier" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("full", _without("classifier"), r"are damaged: classifier\.bias, classifier\.weight are missing"),
        ("lora", _without("layer.0"), r"are damaged: .*lora_A\.weight, .*lora_B\.weight and 2 more are missing"),
        ("sparse lora", _without("layer.1.attention.self.query.lora_B"), r"lora_B\.weight is missing"),
        ("ia3", _without("classifier"), r"could not be loaded: .*classifier\.weight' is missing"),
        ("spartan", _without("classifier"), "do not fit the adapter"),
        ("full", _not_finite, "logits that are not finite"),
        ("lora", _not_finite, "logits that are not finite"),
    ],
)
def test_damaged_weights_are_refused(
    engine: MultiTaskEngine, runs: dict[str, Path], tmp_path: Path, name: str, change: Any, words: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(runs[name], folder)
    (weights,) = folder.glob("*.safetensors")
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    for load in (lambda: Predictor(folder), lambda: engine.add("bad", folder)):
        with pytest.raises(UserError, match=words):
            load()


def test_missing_weights_of_a_language_model_are_refused_but_tied_ones_are_not(tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path / "model", tie_word_embeddings=True)
    load_language_model(str(folder), is_trained=True)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    lost = min(name for name in tensors if name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(lost)):
        load_language_model(str(folder), is_trained=True)


def test_the_task_of_a_damaged_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for place, task in enumerate(({"name": "x"}, 3, {"name": "x", "text_columns": 1})):
        folder = _changed(runs["lora"], tmp_path / str(place), lambda run, task=task: run.update(task=task))
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            Predictor(folder)


def test_runs_that_do_not_fit_a_sparse_or_quantized_backbone(runs: dict[str, Path], backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    sparse = MultiTaskEngine(sparse_backbone(backbone), tokenizer=tokenizer)
    for name, words in (
        ("lora", "was trained on the dense model, but the engine's backbone is sparse; pass the dense backbone"),
        ("pfeiffer", "was trained on the dense model .* attached to a sparse one.* pass the dense backbone"),
        ("sparse", "was trained on a model that was made sparse in another way .* pass the dense backbone"),
        ("sparse lora", "made sparse in another way .* dense backbone"),
    ):
        with pytest.raises(UserError, match=words):
            sparse.add("bad", runs[name])
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(UserError, match="could not be loaded: The FFN has a quantized weight"):
        MultiTaskEngine(model, {"bad": runs["sparse"]}, tokenizer=tokenizer)


def test_runs_that_cannot_be_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, words in (("full", "full fine-tuning, which cannot be exported"), ("sparse", "sparse models cannot be")):
        with pytest.raises(UserError, match=words):
            read_tasks([runs[name]])
    with pytest.raises(UserError, match="There is no folder"):
        read_tasks([tmp_path / "nothing"])
