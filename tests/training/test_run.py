"""Training runs: what they leave, how they resume, what stops them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.tiny import Interrupt, run_config, save_tiny_backbone, topics_rows, write_jsonl

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.folders import UNFINISHED
from sparsepeft.methods.recipes import METHODS
from sparsepeft.runs.files import CHECKPOINTS, RESULTS, RUN
from sparsepeft.runs.folder import check_output_folder
from sparsepeft.runs.history import read_history
from sparsepeft.training import Predictor, RunConfig, evaluate, train
from sparsepeft.training.callbacks import StopAfterStep
from sparsepeft.training.fit import SafeTrainer, last_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_weights_and_results_that_evaluate_agrees_with(
    tiny_backbone: Path, tmp_path: Path, method: str
) -> None:
    results = train(run_config(tiny_backbone, tmp_path, method=method))
    assert json.loads((tmp_path / RESULTS).read_text()) == results
    assert results["score"] == results["metrics"]["test"]["accuracy"]
    assert not (tmp_path / UNFINISHED).exists()
    for part, metrics in evaluate(tmp_path).items():
        assert metrics == pytest.approx(results["metrics"][part])
    assert results["saved_bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    backbone_bytes = (tiny_backbone / "model.safetensors").stat().st_size
    if method == "full":
        assert results["saved_bytes"] > 0.9 * backbone_bytes
    else:
        assert results["saved_bytes"] < backbone_bytes
        assert not (tmp_path / "tokenizer.json").exists()


def test_parameters_are_the_closed_formula_and_the_head(tiny_backbone: Path, tmp_path: Path) -> None:
    settings = {"num_parents": 4, "num_children": 2, "top_k": 2}
    results = train(run_config(tiny_backbone, tmp_path, settings=settings, max_steps=1))
    norms = (1 + 2 * 2) * 2 * 32  # of the embeddings and of both layers
    assert results["parameters"]["adapter"] == 4 * (1 + 2 * 2) * 32 * 2 + norms
    assert results["parameters"]["head"] == 32 * 5 + 5
    assert results["formula"].endswith("1,280, and norms 320")


def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(tiny_backbone: Path, tmp_path: Path) -> None:
    whole = train(run_config(tiny_backbone, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path / "cut"), callbacks=[Interrupt(7)])
    assert last_checkpoint(tmp_path / "cut" / UNFINISHED / CHECKPOINTS) is not None
    resumed = train(run_config(tiny_backbone, tmp_path / "cut"))
    assert resumed["metrics"] == whole["metrics"]
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "cut" / "adapter_model.safetensors")[name], tensor)
    histories = [read_history(tmp_path / name) for name in ("whole", "cut")]
    courses = [[{key: line[key] for key in line if key != "seconds"} for line in history] for history in histories]
    assert courses[0] == courses[1]
    assert [line["step"] for line in courses[0] if "eval_accuracy" in line] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in courses[0] if {"loss", "grad_norm", "learning_rate"} <= line.keys()][:2] == [1, 2]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(histories[1]))


def test_a_broken_checkpoint_is_passed_over(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path), callbacks=[Interrupt(7)])
    good = last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS)
    assert good is not None
    truncated = tmp_path / UNFINISHED / CHECKPOINTS / "checkpoint-999"
    truncated.mkdir()
    (truncated / "trainer_state.json").write_text("{}")
    (truncated / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:100])
    assert last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS) == good


def test_a_finished_run_is_kept_unless_told(tiny_backbone: Path, tmp_path: Path) -> None:
    train(run_config(tiny_backbone, tmp_path, max_steps=1))
    before = (tmp_path / RESULTS).read_text()
    with pytest.raises(UserError, match="`overwrite`"):
        train(run_config(tiny_backbone, tmp_path, max_steps=1))
    assert (tmp_path / RESULTS).read_text() == before
    assert train(run_config(tiny_backbone, tmp_path, max_steps=2), overwrite=True)["steps"] == 2


def test_a_run_is_replaced_when_the_new_one_is_finished(tiny_backbone: Path, tmp_path: Path) -> None:
    former, new = run_config(tiny_backbone, tmp_path, max_steps=3), run_config(tiny_backbone, tmp_path, method="full")
    train(former)
    (tmp_path / "mine.txt").write_text("kept")
    texts = ["A striker scored.", "Shares fell."]
    expected, files = Predictor(tmp_path).logits(texts), {p: p.read_bytes() for p in tmp_path.iterdir()}

    class Asks(Interrupt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                assert (Predictor(tmp_path).logits(texts) == expected).all()
                with pytest.raises(UserError, match="Another process"):
                    train(former, overwrite=True)
            super().on_step_begin(args, state, control)

    with pytest.raises(KeyboardInterrupt):
        train(new, callbacks=[Asks(7)], overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == files
    with pytest.raises(UserError, match="was to be replaced, but the new training was interrupted"):
        Predictor(tmp_path)
    first = []

    class Notes(hf.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            first.append(state.global_step)

    assert train(new, callbacks=[Notes()], overwrite=True)["steps"] == 12
    assert first == [6]  # its last checkpoint
    train(run_config(tiny_backbone, tmp_path / "clean", method="full"))
    assert (Predictor(tmp_path).logits(texts) == Predictor(tmp_path / "clean").logits(texts)).all()
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in (tmp_path / "clean").iterdir()} == {
        "clean",
        "mine.txt",
    }


def test_an_unfinished_run_with_other_values_or_data_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "mine.jsonl", tmp_path / "out"

    def run(labels: str, **changes: Any) -> RunConfig:
        write_jsonl(file, [{"text": f"text {index}", "label": labels[index % 2]} for index in range(40)])
        return run_config(tiny_backbone, out, task="custom", train_file=str(file), **changes)

    with pytest.raises(KeyboardInterrupt):
        train(run("ab"), callbacks=[Interrupt(3)])
    with pytest.raises(UserError, match="holds no trained weights yet"):
        Predictor(out)
    with pytest.raises(UserError, match="other values of learning_rate;"):
        train(run("ab", learning_rate=0.5))
    with pytest.raises(UserError, match=r"other values of label_names, mine.jsonl \(its content\);"):
        train(run("xy"))
    assert train(run("ab", save_dtype="bf16"))["steps"] == 12


def test_a_run_that_ended_before_a_checkpoint_is_in_nobodys_way(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path), callbacks=[Interrupt(1)])
    assert (tmp_path / UNFINISHED / RUN).exists()
    plans: list[Any] = []
    assert train(run_config(tiny_backbone, tmp_path, max_steps=1, seed=1), announce=plans.append)["steps"] == 1
    (plan,) = plans
    assert (plan.steps, plan.steps_done, plan.batch_size, plan.device) == (1, 0, 8, "cpu")
    assert plan.sizes == {"training": 270, "selection": 30, "validation": 60, "test": 120}


def test_a_stop_saves_the_step_it_is_at(tiny_backbone: Path, tmp_path: Path) -> None:
    class Asks(StopAfterStep):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                assert self.ask(KeyboardInterrupt("enough"))
                assert not self.ask(KeyboardInterrupt("more"))

    stop = Asks()
    assert not stop.ask(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="enough"):
        train(run_config(tiny_backbone, tmp_path), callbacks=[stop])
    checkpoint = last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS)
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-5"


def test_what_cannot_be_used_leaves_no_folder(tiny_backbone: Path, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "mpnet", build=lambda **values: hf.MPNetModel(hf.MPNetConfig(**values)))
    with pytest.raises(UserError, match="hands on more than its hidden states"):
        train(run_config(backbone, tmp_path / "out", method="head", cache_frozen_layers=True, few_shot=10))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has the format version 2, but .* reads up to 1; upgrade"),
        ({"schedule": "x"}, "has the key 'schedule', which"),
        ({"config": {"optimizer": "x"}}, "has the key 'optimizer' of config, which"),
        ({"task": {"source": "x"}}, "has the key 'source' of task, which"),
    ],
)
def test_run_files_of_other_versions(tiny_backbone: Path, tmp_path: Path, change: dict, message: str) -> None:
    train(run_config(tiny_backbone, tmp_path, max_steps=1))
    run = json.loads((tmp_path / RUN).read_text())
    assert run["format_version"] == 1
    changed = {key: run.get(key, {}) | value if isinstance(value, dict) else value for key, value in change.items()}
    (tmp_path / RUN).write_text(json.dumps(run | changed))
    for read in (Predictor, evaluate):
        with pytest.raises(UserError, match=message):
            read(tmp_path)
    old = {key: run[key] for key in ("config", "recipe", "task")}
    old["config"].pop("save_dtype")
    (tmp_path / RUN).write_text(json.dumps(old))
    assert Predictor(tmp_path).predict(["A striker scored."])[0].label


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SafeTrainer.compute_loss

    def diverge(self: SafeTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 7 and self.model.training else loss

    monkeypatch.setattr(SafeTrainer, "compute_loss", diverge)
    with pytest.raises(RunFailed, match=r"nan at step 8.*checkpoint-6"):
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
    with pytest.raises(RunFailed, match=r"No space left.*last good checkpoint is checkpoint-4"):
        train(run_config(tiny_backbone, tmp_path))
    kept = last_checkpoint(tmp_path / UNFINISHED / CHECKPOINTS)
    assert kept is not None
    assert kept.name == "checkpoint-4"
    assert not Path(calls[-1]).exists()
    monkeypatch.undo()
    assert train(run_config(tiny_backbone, tmp_path))["steps"] == 12


def test_a_full_disk_at_the_end_leaves_what_was_there(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_config(tiny_backbone, tmp_path, max_steps=2))
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    from sparsepeft.methods import saving

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "replace", full)
    with pytest.raises((RunFailed, OSError), match="No space left"):
        train(run_config(tiny_backbone, tmp_path, max_steps=2, seed=1), overwrite=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_few_shot_trains_on_k_examples_without_choosing(tiny_backbone: Path, tmp_path: Path) -> None:
    results = train(run_config(tiny_backbone, tmp_path, few_shot=20, max_steps=3))
    assert results["num_train"] == 20
    assert results["best_step"] is None


def test_max_train_samples_includes_the_tenth_for_choosing(tiny_backbone: Path, tmp_path: Path) -> None:
    assert train(run_config(tiny_backbone, tmp_path, max_train_samples=50, max_steps=2))["num_train"] == 45


def test_long_texts_are_cut_and_said_once(
    tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = train(run_config(tiny_backbone, tmp_path, max_length=10, max_steps=1))
    said = [record for record in caplog.records if "were cut" in record.getMessage()]
    assert len(said) == 1
    assert results["num_cut"] > 300
    with pytest.raises(UserError, match="at most 64 tokens"):
        train(run_config(tiny_backbone, tmp_path / "more", max_length=65))


@pytest.mark.parametrize(
    ("method", "save_dtype", "dtype"),
    [("spartan", "bf16", "bfloat16"), ("spartan", "float16", "float16"), ("lora", "bf16", "bfloat16")],
)
def test_save_dtype_halves_the_file(
    tiny_backbone: Path, tmp_path: Path, method: str, save_dtype: str, dtype: str
) -> None:
    full = train(run_config(tiny_backbone, tmp_path / "full", method=method))
    half = train(run_config(tiny_backbone, tmp_path / "half", method=method, save_dtype=save_dtype))
    saved = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}"}
    header = 2500  # the names in the file do not shrink
    assert half["saved_bytes"] - header < 0.55 * (full["saved_bytes"] - header)
    texts = ["A striker scored.", "Shares fell."]
    wide, narrow = Predictor(tmp_path / "full").predict(texts), Predictor(tmp_path / "half").predict(texts)
    assert [p.label for p in wide] == [p.label for p in narrow]


def test_bf16_precision_runs(tiny_backbone: Path, tmp_path: Path) -> None:
    assert train(run_config(tiny_backbone, tmp_path, precision="bf16", max_steps=2))["steps"] == 2


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler on a CPU"
)
@pytest.mark.parametrize("method", ["spartan", "pfeiffer"])
def test_a_compiled_run_trains_the_same(tmp_path: Path, method: str) -> None:
    backbone = save_tiny_backbone(tmp_path / "backbone", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    changes = {"method": method, "few_shot": 16, "max_steps": 3}
    eager = train(run_config(backbone, tmp_path / "eager", **changes))
    compiled = train(run_config(backbone, tmp_path / "compiled", compile=True, **changes))
    for part, metrics in evaluate(tmp_path / "compiled").items():
        assert metrics == pytest.approx(compiled["metrics"][part])
    expected = load_file(tmp_path / "eager" / "adapter_model.safetensors")
    found = load_file(tmp_path / "compiled" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert compiled["saved_bytes"] == eager["saved_bytes"]
    for name, tensor in expected.items():
        # Adam moves a weight by up to the learning rate however small its gradient is; fused sums round differently.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.03 * 3e-3)


def test_another_backbone_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    train(run_config(tiny_backbone, tmp_path / "run", max_steps=1))
    other = save_tiny_backbone(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="other values"):
        Predictor(tmp_path / "run", model=str(other))


@pytest.mark.parametrize(("method", "save_dtype"), [("spartan", "int8"), ("lora", "bf16"), ("full", "bf16")])
def test_regression_of_pairs_is_scored_as_saved(
    tiny_backbone: Path, tmp_path: Path, method: str, save_dtype: str
) -> None:
    texts = [row["text"] for row in topics_rows("train")]
    rows = [{"a": a, "b": b, "y": len(a)} for a, b in zip(texts[:40], texts[40:80], strict=True)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run = run_config(
        tiny_backbone,
        tmp_path / "run",
        task="custom",
        train_file=str(file),
        text_column="a",
        text_pair_column="b",
        label_column="y",
        problem_type="regression",  # whole numbers would be classes
        max_steps=4,
        method=method,
        save_dtype=save_dtype,
    )
    results = train(run)
    assert results["main_metric"] in results["metrics"]["validation"]
    # Of the rounded weights: those in float32 have other scores by 1e-4 and more.
    assert evaluate(tmp_path / "run")["validation"] == pytest.approx(results["metrics"]["validation"], abs=1e-6)
    (prediction,) = Predictor(tmp_path / "run").predict([("one text", "another")])
    assert prediction.label is None
    assert isinstance(prediction.score, float)
    with pytest.raises(UserError, match=r"takes 2 text\(s\)"):
        Predictor(tmp_path / "run").predict(["one text alone"])


def test_predictions_are_in_order_and_independent_of_batching(tiny_backbone: Path, tmp_path: Path) -> None:
    train(run_config(tiny_backbone, tmp_path, max_steps=4))
    texts = [row["text"] for row in topics_rows("test")][:20]
    batched, single = Predictor(tmp_path, batch_size=7).predict(texts), Predictor(tmp_path, batch_size=1).predict(texts)
    for one, other in zip(batched, single, strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert sum(one.scores.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("damage", ["truncate", "foreign", "missing", "run"])
def test_damaged_files_are_named(tiny_backbone: Path, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    train(run_config(tiny_backbone, tmp_path, max_steps=1))
    weights = tmp_path / "adapter_model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "foreign":
        save_file({"something.else": torch.zeros(3)}, weights)
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / RUN).write_text("{")
    with pytest.raises(UserError) as caught:
        Predictor(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_called_as_a_runs_is_no_run(tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"holds other files \(run.json\)"):
        check_output_folder(tmp_path, overwrite=True)


@pytest.mark.slow
def test_another_backbone_is_refused_for_pefts_own_methods(tiny_backbone: Path, tmp_path: Path) -> None:
    train(run_config(tiny_backbone, tmp_path / "o", method="lora", max_steps=1, max_length=8))
    other = save_tiny_backbone(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the backbone that the adapter was trained on"):
        Predictor(tmp_path / "o", str(other))
    answer = Predictor(tmp_path / "o").predict(["one two three four five six seven eight nine ten"])[0]
    assert answer.truncated
