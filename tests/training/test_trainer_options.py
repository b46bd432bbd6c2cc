"""Options that people know from transformers' trainer: what they do and refuse; runs resume with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.tiny import Interrupt, run_config, save_tiny_backbone, topics_rows, write_jsonl
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss

from sparsepeft.errors import UserError
from sparsepeft.runs.history import read_history
from sparsepeft.tasks import TaskSpec
from sparsepeft.training import RunConfig, load_config, train
from sparsepeft.training.loss import TaskLoss, check_loss, task_loss

MAIL = TaskSpec("mail", ("text",), ("ham", "spam", "other"), ("accuracy",), "accuracy", 1)
VALUES = TaskSpec("values", ("text",), None, ("pearson",), "pearson", 1)
LABELS = torch.tensor([0] * 4 + [1] * 2 + [2])


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (None, None),
        ("balanced", [7 / 12, 7 / 6, 7 / 3]),
        ("spam=3, other=0.5", [1.0, 3.0, 0.5]),
        ({"ham": 2}, [2.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_single_labels_is_torchs(given: Any, weights: list[float] | None, smoothing: float) -> None:
    options = {"class_weights": given, "label_smoothing_factor": smoothing, "gradient_accumulation_steps": 2}
    loss = task_loss(MAIL, LABELS.tolist(), RunConfig("topics", "o", **options))
    assert loss is not None
    logits = torch.randn(7, 3)
    expected = CrossEntropyLoss(weight=None if weights is None else torch.tensor(weights), label_smoothing=smoothing)
    torch.testing.assert_close(loss({"logits": logits}, LABELS), expected(logits, LABELS))
    count = loss.count([LABELS[:3], LABELS[3:]])
    parts = [loss({"logits": logits[part]}, LABELS[part], count) for part in (slice(3), slice(3, 7))]
    torch.testing.assert_close(sum(parts), expected(logits, LABELS))


def test_a_class_without_rows_does_not_count_when_weights_are_balanced() -> None:
    """As in scikit-learn; by smoothing it would have the gradient of all others together."""
    balanced = RunConfig("topics", "o", class_weights="balanced", label_smoothing_factor=0.1)
    loss = task_loss(MAIL, [0] * 6 + [2] * 2, balanced)
    assert loss is not None
    assert loss.weights.tolist() == pytest.approx([8 / 12, 1, 8 / 4])


def test_class_weights_by_labels_as_files_write_them() -> None:
    truth, number = (replace(MAIL, label_names=names) for names in (("false", "true"), ("0", "1")))
    for spec, given in ((truth, {True: 3, False: 1}), (truth, "TRUE=3"), (number, {1: 3, 0: 1}), (number, "1.0=3,0=1")):
        config = RunConfig("topics", "o", class_weights=given)
        check_loss(spec, config)
        loss = task_loss(spec, [0, 1], config)
        assert loss is not None
        assert loss.weights.tolist() == [1, 3]
    yes = replace(MAIL, label_names=("no", "yes"))
    with pytest.raises(UserError, match=r"'true' is unknown; valid are no, yes. YAML reads yes, no, on and off so"):
        check_loss(yes, RunConfig("topics", "o", class_weights={True: 3}))


def test_the_loss_of_several_labels_is_torchs() -> None:
    labels = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    logits = torch.randn(4, 3)
    expected = BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 4.0, 1.0]))(logits, labels.float())
    loss = TaskLoss("multi_label_classification", torch.tensor([1.0, 4.0, 1.0]))
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], loss.count([labels])) for i in (0, 2)]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize(
    ("spec", "given", "words"),
    [
        (VALUES, {"class_weights": "balanced"}, "`class_weights` was given, but the task values is a regression"),
        (VALUES, {"label_smoothing_factor": 0.1}, "`label_smoothing_factor` was given, but the task values"),
        (MAIL, {"class_weights": {"spm": 2.0}}, "label 'spm' is unknown; valid are ham, other, spam; did you mean"),
    ],
)
def test_what_a_task_has_no_classes_for_is_refused(spec: TaskSpec, given: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_loss(spec, RunConfig("topics", "o", **given))


@pytest.mark.parametrize(
    "given", ["spam", "spam=x", "spam=1,spam=2", "spam=-1", "=2", "", {"spam": float("nan")}, {}, 3]
)
def test_malformed_class_weights(given: Any) -> None:
    with pytest.raises(UserError, match=r"`class_weights=.*expected `class_weights=balanced`, or a positive number"):
        RunConfig("topics", "o", class_weights=given)


def test_the_options_are_the_recipe_s_and_can_be_settings(tmp_path: Path) -> None:
    given = {"weight_decay": 0.1, "warmup_ratio": 0.5, "lr_scheduler_type": "cosine"}
    for config in (RunConfig("topics", "o", **given), RunConfig("topics", "o", settings=given)):
        recipe = config.recipe_values()
        assert (recipe.weight_decay, recipe.warmup_ratio, recipe.lr_scheduler_type) == (0.1, 0.5, "cosine")
        assert "weight_decay" not in recipe.adapter
    assert load_config({"task": "topics", "output_dir": "o", "settings": given}).settings == {}
    with pytest.raises(UserError, match="`weight_decay` was given both"):
        RunConfig("topics", "o", weight_decay=0.1, settings={"weight_decay": 0.1})
    assert RunConfig("topics", "o", lr_scheduler_type="constant").recipe_values().warmup_ratio == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spartan", "lora", "full"])
def test_head_and_norms_have_rates_of_their_own(tiny_backbone: Path, tmp_path: Path, method: str) -> None:
    moved, sizes = {}, {}

    class Notes(hf.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, p in kwargs["model"].named_parameters():
                if p.requires_grad and not torch.equal(p, self.before[name]):
                    part = "head" if "classifier" in name else "norms" if "LayerNorm" in name else "rest"
                    moved[part] = max(moved.get(part, 0.0), (p - self.before[name]).abs().max().item())
            for group in kwargs["optimizer"].param_groups:
                rate = group["initial_lr"]
                sizes[rate] = sizes.get(rate, 0) + sum(p.numel() for p in group["params"])

    rates = {"head_learning_rate": 1e-6} | ({} if method == "lora" else {"norms_learning_rate": 1e-5})
    options = {"method": method, "few_shot": 32, "max_steps": 2, "learning_rate": 1e-3}
    result = train(run_config(tiny_backbone, tmp_path / "run", settings=rates, **options), [Notes()])
    assert moved["head"] < 4e-6 < 1e-4 < moved["rest"]
    assert "norms_learning_rate" not in rates or 4e-6 < moved["norms"] < 1e-4
    assert sum(sizes.values()) == result["parameters"]["trained"]
    if method != "full":
        assert sizes[1e-6] == result["parameters"]["head"]
    if method != "lora":
        assert sizes[1e-5] == 2 * 32 * (1 + 2 * 2)  # of the embeddings and of two layers
    assert rates.items() <= result["hyperparameters"].items()


@pytest.mark.slow
def test_a_rate_for_norms_that_nobody_trains(tiny_backbone: Path, tmp_path: Path) -> None:
    settings = {"train_layer_norms": False, "norms_learning_rate": 1e-4}
    config = run_config(tiny_backbone, tmp_path, few_shot=32, max_steps=1, settings=settings)
    with pytest.raises(UserError, match=r"`method=spartan` trains no normalisation layers.*train_layer_norms=true"):
        train(config)


def test_a_language_model_has_no_head_to_train(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no head of its own"):
        RunConfig("lm", "o", model="m", text="t.txt", settings={"head_learning_rate": 1e-3})


@pytest.mark.slow
def test_two_batches_a_step_are_one_twice_as_large(tmp_path: Path) -> None:
    """Whatever the model makes of ``num_items_in_batch``: the reported norm is that of the gradient."""
    backbone = save_tiny_backbone(tmp_path / "backbone", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    seen = {}
    for batch_size, steps in ((32, 1), (16, 2)):

        class Notes(hf.TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                seen.setdefault(args.gradient_accumulation_steps, []).append(dict(logs or {}))

        options = {"batch_size": batch_size, "gradient_accumulation_steps": steps, "class_weights": "balanced"}
        options |= {"few_shot": 32, "max_steps": 1, "seed": 1, "gradient_checkpointing": steps == 2}
        train(run_config(backbone, tmp_path / str(steps), **options), callbacks=[Notes()])
    one, two = seen[1][0], seen[2][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_a_run_that_stops_early_resumes_as_if_it_had_not_been_interrupted(tiny_backbone: Path, tmp_path: Path) -> None:
    options = {
        "learning_rate": 1e-9,  # never better than at first
        "max_steps": 40,
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "class_weights": "balanced",
        "label_smoothing_factor": 0.1,
        "gradient_accumulation_steps": 2,
    }
    whole = train(run_config(tiny_backbone, tmp_path / "whole", **options))
    assert (whole["steps"], whole["best_step"]) == (6, 2)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path / "cut", **options), callbacks=[Interrupt(5)])
    resumed = train(run_config(tiny_backbone, tmp_path / "cut", **options, device="cpu"))
    assert (resumed["steps"], resumed["metrics"]) == (whole["steps"], whole["metrics"])
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "cut" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "steps"),
    [
        ({"few_shot": 20}, 5),
        ({"eval_steps": 2}, 5),
        ({"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 1e-9}, 2),
    ],
)
def test_a_run_that_was_killed_after_its_last_step_takes_no_other(
    tiny_backbone: Path, tmp_path: Path, choice: dict[str, Any], steps: int
) -> None:
    class Kill(hf.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    options = choice | {"max_steps": 5, "lr_scheduler_type": "constant"}  # 3 steps an epoch
    whole = train(run_config(tiny_backbone, tmp_path / "whole", **options))
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path / "cut", **options), callbacks=[Kill()])
    cut = train(run_config(tiny_backbone, tmp_path / "cut", **options))
    assert cut["steps"] == whole["steps"] == steps
    assert cut["train_seconds"] >= read_history(tmp_path / "cut")[-1]["seconds"]  # of all parts
    assert (cut["best_step"], cut["metrics"]) == (whole["best_step"], whole["metrics"])
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "cut" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.slow
def test_class_weights_help_the_rare_class(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = {label: [row for row in topics_rows("train") if row["label"] == label] for label in ("sport", "travel")}
    files = {
        "train_file": write_jsonl(tmp_path / "train.jsonl", rows["sport"][:40] + rows["travel"][:6]),
        "validation_file": write_jsonl(tmp_path / "validation.jsonl", rows["sport"][40:60] + rows["travel"][40:60]),
    }
    run = {"task": "custom", "few_shot": 46, "learning_rate": 0.02} | {key: str(file) for key, file in files.items()}
    plain = train(run_config(tiny_backbone, tmp_path / "plain", **run))
    weighted = train(run_config(tiny_backbone, tmp_path / "weighted", **run, class_weights={"travel": 100.0}))
    recall = [each["report"]["per_class"]["travel"]["recall"] for each in (plain, weighted)]
    assert recall[0] < recall[1]
    assert plain["baseline"] == {"answer": "sport", "metrics": pytest.approx({"accuracy": 0.5, "macro_f1": 1 / 3})}
    assert weighted["hyperparameters"]["class_weights"] == {"sport": 1.0, "travel": 100.0}
