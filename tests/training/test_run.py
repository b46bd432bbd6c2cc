"""Training runs: what they leave, how they resume, what stops them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.tiny import Interrupt, run_config, save_tiny_backbone, topics_rows, write_jsonl

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import UNFINISHED
from sparsepeft.methods import saving
from sparsepeft.methods.recipes import METHODS
from sparsepeft.runs.files import CHECKPOINTS, RESULTS, RUN, read_run
from sparsepeft.runs.folder import check_output_folder
from sparsepeft.runs.history import read_history
from sparsepeft.training import Predictor, RunConfig, evaluate, model, train
from sparsepeft.training.callbacks import StopAfterStep
from sparsepeft.training.checkpoints import last_checkpoint
from sparsepeft.training.data import prepare_data
from sparsepeft.training.fit import SafeTrainer

pytestmark = pytest.mark.slow
Trained = Callable[..., tuple[Path, dict]]
TEXTS = ["A striker scored.", "Shares fell."]
WEIGHTS = "adapter_model.safetensors"
DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((name, lambda content: content[:-20]) for name in (WEIGHTS, "optimizer.pt", "trainer_state.json")),
    *((name, lambda content: b"") for name in ("scheduler.pt", "rng_state.pth", "adapter_config.json")),
    ("trainer_state.json", lambda content: re.sub(rb'(?<=/checkpoint-)\d+"', b'1"', content)),  # the best one is gone
]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_weights_and_results_that_evaluate_agrees_with(
    tiny_backbone: Path, trained: Trained, method: str
) -> None:
    folder, results = trained(method=method)
    assert json.loads((folder / RESULTS).read_text()) == results
    assert results["score"] == results["metrics"]["test"]["accuracy"]
    assert not (folder / UNFINISHED).exists()
    for part, metrics in evaluate(folder).items():
        assert metrics == pytest.approx(results["metrics"][part])
    assert results["saved_bytes"] == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    backbone_bytes = (tiny_backbone / "model.safetensors").stat().st_size
    if method == "full":
        assert results["saved_bytes"] > 0.9 * backbone_bytes
    else:
        assert results["saved_bytes"] < backbone_bytes
        assert not (folder / "tokenizer.json").exists()
    with pytest.raises(UserError, match="`overwrite`"):
        train(run_config(tiny_backbone, folder, method=method))


def test_parameters_are_the_closed_formula_and_the_head(trained: Trained) -> None:
    parameters, formula = (trained(method="spartan")[1][key] for key in ("parameters", "formula"))
    norms = (1 + 2 * 2) * 2 * 32  # of the embeddings and of both layers
    assert parameters["adapter"] == 16 * (1 + 2 * 3) * 32 * 2 + norms
    assert parameters["head"] == 32 * 5 + 5
    assert formula.endswith("7,168, and norms 320")


def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(
    tiny_backbone: Path, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, results = trained(method="spartan")
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path), callbacks=[Interrupt(7)])
    checkpoints = tmp_path / UNFINISHED / CHECKPOINTS
    good = last_checkpoint(checkpoints)
    assert good is not None
    for number, (name, change) in enumerate(DAMAGES):  # of newer ones, which are passed over
        damaged = Path(shutil.copytree(good, checkpoints / f"checkpoint-{990 + number}")) / name
        damaged.write_bytes(change(damaged.read_bytes()))
        assert last_checkpoint(checkpoints) == good, (name, change)
    assert caplog.text.count("checkpoint-990 is incomplete or damaged and is passed over") == len(DAMAGES)
    resumed = train(run_config(tiny_backbone, tmp_path))
    assert resumed["metrics"] == results["metrics"]
    for name, tensor in load_file(whole / WEIGHTS).items():
        torch.testing.assert_close(load_file(tmp_path / WEIGHTS)[name], tensor)
    histories = [read_history(folder) for folder in (whole, tmp_path)]
    courses = [[{key: line[key] for key in line if key != "seconds"} for line in history] for history in histories]
    assert courses[0] == courses[1]
    assert [line["step"] for line in courses[0] if "eval_accuracy" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in courses[0] if {"loss", "grad_norm", "learning_rate"} <= line.keys()][:2] == [1, 2]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(histories[1]))


def test_a_run_is_replaced_when_the_new_one_is_finished(
    tiny_backbone: Path, trained: Trained, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    former, new = run_config(tiny_backbone, finished), run_config(tiny_backbone, finished, method="full")
    (finished / "mine.txt").write_text("kept")
    expected, files = Predictor(finished).logits(TEXTS), {path: path.read_bytes() for path in finished.iterdir()}

    class Asks(Interrupt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                assert (Predictor(finished).logits(TEXTS) == expected).all()
                with pytest.raises(UserError, match="Another process"):
                    train(former, overwrite=True)
            super().on_step_begin(args, state, control)

    with pytest.raises(KeyboardInterrupt):
        train(new, callbacks=[Asks(7)], overwrite=True)
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == files
    assert (Predictor(finished).logits(TEXTS) == expected).all()
    assert "was to be replaced, but the new training was interrupted" in caplog.text
    plans: list[Any] = []
    assert train(new, overwrite=True, announce=plans.append)["steps"] == 12
    assert plans[0].steps_done == 6  # its last checkpoint
    clean = trained(method="full")[0]
    assert (Predictor(finished).logits(TEXTS) == Predictor(clean).logits(TEXTS)).all()
    assert {path.name for path in finished.iterdir()} - {path.name for path in clean.iterdir()} == {"mine.txt"}


def test_an_unfinished_run_with_other_values_or_data_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.jsonl", tmp_path / "out"

    def run(labels: str, **changes: Any) -> RunConfig:
        write_jsonl(file, [{"text": f"text {index}", "label": labels[index % 2]} for index in range(40)])
        values = {"task": "custom", "train_file": str(file), "max_steps": 5}
        return run_config(tiny_backbone, out, **values, **changes)

    with pytest.raises(KeyboardInterrupt):
        train(run("ab"), callbacks=[Interrupt(3)])
    with pytest.raises(UserError, match="holds no trained weights yet"):
        Predictor(out)
    with pytest.raises(UserError, match="other values of learning_rate;"):
        train(run("ab", learning_rate=0.5))
    with pytest.raises(UserError, match=r"other values of label_names, mine.jsonl \(its content\);"):
        train(run("xy"))
    assert train(run("ab", save_dtype="bf16"))["steps"] == 5


def test_a_run_that_ended_before_a_checkpoint_is_in_nobodys_way(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path), callbacks=[Interrupt(1)])
    assert (tmp_path / UNFINISHED / RUN).exists()
    plans: list[Any] = []
    other = run_config(tiny_backbone, tmp_path, max_steps=1, seed=1, precision="bf16")
    assert train(other, announce=plans.append)["steps"] == 1
    (plan,) = plans
    assert (plan.steps, plan.steps_done, plan.batch_size, plan.device, plan.precision) == (1, 0, 8, "cpu", "bf16")
    assert plan.sizes == {"training": 270, "selection": 30, "validation": 60, "test": 120}


def test_a_stop_saves_the_step_it_is_at(tiny_backbone: Path, tmp_path: Path) -> None:
    class Asks(StopAfterStep):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                assert self.ask(KeyboardInterrupt("enough"))
                assert not self.ask(KeyboardInterrupt("more"))

    stop = Asks()
    assert not stop.ask(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="enough"):
        train(run_config(tiny_backbone, tmp_path), callbacks=[stop])
    checkpoint = last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"


def test_what_cannot_be_used_leaves_no_folder(tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "mpnet", build=lambda **values: hf.MPNetModel(hf.MPNetConfig(**values)))
    with pytest.raises(UserError, match="MPNetLayer hands on more than its hidden states"):
        train(run_config(backbone, tmp_path / "out", method="head", cache_frozen_layers=True, few_shot=10))
    assert not (tmp_path / "out").exists()
    (tmp_path / "run.json").write_text('{"a": 1}')  # called as a run's, but none
    with pytest.raises(UserError, match=r"holds other files \(.*run.json"):
        check_output_folder(tmp_path, overwrite=True)


def test_run_files_of_other_versions(finished: Path) -> None:
    run = json.loads((finished / RUN).read_text())
    assert run["format_version"] == 1
    for change, message in (
        ({"format_version": 2}, "has the format version 2, but .* reads up to 1; upgrade"),
        ({"schedule": "x"}, "has the key 'schedule', which"),
        ({"config": run["config"] | {"optimizer": "x"}}, "has the key 'optimizer' of config, which"),
        ({"task": run["task"] | {"source": "x"}}, "has the key 'source' of task, which"),
    ):
        (finished / RUN).write_text(json.dumps(run | change))
        for read in (Predictor, evaluate):
            with pytest.raises(UserError, match=message):
                read(finished)
    old = {key: run[key] for key in ("config", "recipe", "task")}
    for name in ("save_dtype", "class_weights", "gradient_checkpointing", "gradient_accumulation_steps"):
        del old["config"][name]
    old["config"]["gradient_accumulation"] = 2
    (finished / RUN).write_text(json.dumps(old))
    config = RunConfig(**read_run(finished)["config"])
    assert (config.gradient_accumulation_steps, config.gradient_checkpointing) == (2, False)
    assert Predictor(finished).predict(TEXTS)[0].label


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SafeTrainer.compute_loss

    def diverge(self: SafeTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 and self.model.training else loss

    monkeypatch.setattr(SafeTrainer, "compute_loss", diverge)
    with pytest.raises(RunFailed, match=r"nan at step 4.*checkpoint-2"):
        train(run_config(tiny_backbone, tmp_path))
    assert last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS) is not None
    assert not (tmp_path / RESULTS).exists()


def test_a_full_disk_leaves_the_previous_checkpoint(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    original = PeftModel.save_pretrained
    calls = []

    def fill(self: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        calls.append(folder)
        original(self, folder, *args, **kwargs)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", fill)
    config = run_config(tiny_backbone, tmp_path, max_steps=4)
    with pytest.raises(RunFailed, match=r"No space left.*last good checkpoint is checkpoint-2"):
        train(config)
    kept = last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS)
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert not Path(calls[-1]).exists()
    monkeypatch.undo()
    assert train(config)["steps"] == 4


def test_a_full_disk_at_the_end_leaves_what_was_there(
    tiny_backbone: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (finished / WEIGHTS).read_bytes()

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "replace", full)
    with pytest.raises((RunFailed, OSError), match="No space left"):
        train(run_config(tiny_backbone, finished, max_steps=1, seed=1), overwrite=True)
    assert (finished / WEIGHTS).read_bytes() == before


def test_long_texts_are_cut_and_said_once(
    tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = prepare_data(run_config(tiny_backbone, tmp_path, max_length=10, max_train_samples=50))
    said = [record for record in caplog.records if "were cut" in record.getMessage()]
    assert len(said) == 1
    assert data.num_cut > 150
    assert (len(data.train), len(data.selection)) == (45, 5)  # the tenth for choosing is of the 50
    for max_length, words in ((65, "at most 64 tokens"), (2, "leaves no room for text")):
        with pytest.raises(UserError, match=words):
            prepare_data(run_config(tiny_backbone, tmp_path, max_length=max_length))


@pytest.mark.parametrize(
    ("method", "save_dtype", "dtype"), [("spartan", "float16", "float16"), ("lora", "bf16", "bfloat16")]
)
def test_save_dtype_halves_the_file(
    tiny_backbone: Path, trained: Trained, tmp_path: Path, method: str, save_dtype: str, dtype: str
) -> None:
    folder, full = trained(method=method)
    half = train(run_config(tiny_backbone, tmp_path, method=method, save_dtype=save_dtype))
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / WEIGHTS).values()} == {f"torch.{dtype}"}
    header = 2500  # the names in the file do not shrink
    assert half["saved_bytes"] - header < 0.55 * (full["saved_bytes"] - header)
    wide, narrow = Predictor(folder).predict(TEXTS), Predictor(tmp_path).predict(TEXTS)
    assert [p.label for p in wide] == [p.label for p in narrow]


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on a CPU"
)
def test_a_compiled_run_trains_the_same(tmp_path: Path) -> None:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    backbone = save_tiny_backbone(tmp_path / "backbone", num_hidden_layers=1, **no_dropout)
    rows = {part: write_jsonl(tmp_path / f"{part}.jsonl", topics_rows(part)[:32]) for part in ("train", "validation")}
    files = {f"{part}_file": str(file) for part, file in rows.items()}
    # All batches have one shape, so that one graph is compiled for training and one for scoring.
    changes = {"task": "custom", "few_shot": 16, "max_length": 6, "max_steps": 2} | files
    eager = train(run_config(backbone, tmp_path / "eager", **changes))
    compiled = train(run_config(backbone, tmp_path / "compiled", compile=True, **changes))
    for part, metrics in evaluate(tmp_path / "compiled").items():
        assert metrics == pytest.approx(compiled["metrics"][part])
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("eager", "compiled"))
    assert found.keys() == expected.keys()
    assert compiled["saved_bytes"] == eager["saved_bytes"]
    for name, tensor in expected.items():
        # Adam moves a weight by up to the learning rate however small its gradient is; fused sums round differently.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.03 * 2e-3)


@pytest.mark.parametrize(
    ("method", "words"), [("spartan", "other values"), ("lora", "is not the backbone that the adapter was trained on")]
)
def test_another_backbone_is_refused(trained: Trained, tmp_path: Path, method: str, words: str) -> None:
    other = save_tiny_backbone(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=words):
        Predictor(trained(method=method)[0], model=str(other))


@pytest.mark.parametrize(("method", "save_dtype"), [("spartan", "int8"), ("lora", "bf16"), ("full", "bf16")])
def test_regression_of_pairs_is_scored_as_saved(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, save_dtype: str
) -> None:
    # Training may compute by oneDNN, whose sums round otherwise: correlations of nearly equal predictions tell.
    monkeypatch.setattr(model, "is_onednn_faster", lambda dtype: False)
    texts = [row["text"] for row in topics_rows("train")]
    rows = [{"a": a, "b": b, "y": len(a)} for a, b in zip(texts[:40], texts[40:80], strict=True)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    own = {"task": "custom", "train_file": str(file), "problem_type": "regression"}  # whole numbers would be classes
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "y"}
    changes = {"max_steps": 4, "method": method, "save_dtype": save_dtype}
    results = train(run_config(tiny_backbone, tmp_path / "run", **own, **columns, **changes))
    assert results["main_metric"] in results["metrics"]["validation"]
    # Of the rounded weights: those in float32 have other scores by 1e-4 and more.
    assert evaluate(tmp_path / "run")["validation"] == pytest.approx(results["metrics"]["validation"], abs=1e-6)
    (prediction,) = Predictor(tmp_path / "run").predict([("one text", "another")])
    assert prediction.label is None
    assert isinstance(prediction.score, float)
    with pytest.raises(UserError, match=r"takes 2 text\(s\)"):
        Predictor(tmp_path / "run").predict(["one text alone"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-50])),
        (WEIGHTS, lambda path: save_file({"something.else": torch.zeros(3)}, path)),
        (WEIGHTS, Path.unlink),
        (RUN, lambda path: path.write_text("{")),
    ],
)
def test_damaged_files_are_named(finished: Path, name: str, change: Callable[[Path], Any]) -> None:
    change(finished / name)
    with pytest.raises(UserError) as caught:
        Predictor(finished)
    assert str(finished) in str(caught.value)


@pytest.mark.slow
def test_a_run_cut_within_an_epoch_goes_on_alike(tiny_backbone: Path, tmp_path: Path) -> None:
    def run(name: str) -> RunConfig:
        return run_config(tiny_backbone, tmp_path / name, max_steps=60, eval_steps=7)

    def history(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        return [{key: one.get(key) for key in ("step", "loss", "score")} for one in lines]

    train(run("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(run("cut"), callbacks=[Interrupt(52)])
    train(run("cut"))  # from step 49
    assert history("cut") == history("whole")
