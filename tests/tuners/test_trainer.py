"""transformers' Trainer, accelerate's launcher, and the example that uses nothing else of ours than the config."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.models import SMALL, adapted, adapter_parameters, run, save_backbone
from tests.tiny import save_tiny_backbone

from sparsepeft import SpartanConfig

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_trainer.py"


class _Rows(torch.utils.data.Dataset):
    """Sequences whose label is whether they begin with a high token."""

    def __init__(self, count: int, num_labels: int = 2) -> None:
        generator = torch.Generator().manual_seed(count)
        self.ids = torch.randint(3, 99, (count, 7), generator=generator)
        self.labels = self.ids[:, 0] * num_labels // 99

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(7), "labels": self.labels[index]}


ROWS = {"input_ids": _Rows(8).ids, "attention_mask": torch.ones(8, 7, dtype=torch.long)}


def _trainer(model: PeftModel, folder: Path, **settings) -> hf.Trainer:
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = hf.TrainingArguments(str(folder), **(defaults | settings))
    return hf.Trainer(model, arguments, train_dataset=_Rows(40), eval_dataset=_Rows(16))


def _fresh(folder: str, adapter: str = "default", **config) -> PeftModel:
    torch.manual_seed(1)
    backbone = hf.BertForSequenceClassification.from_pretrained(folder)
    return get_peft_model(backbone, SpartanConfig(**SMALL, **config), adapter)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    return save_backbone("bert", tmp_path_factory.mktemp("backbone"))


@pytest.mark.parametrize(("adapter", "save_dtype"), [("default", None), ("named", "int8")])
def test_resuming_continues_where_it_stopped(backbone: str, tmp_path, save_dtype: str | None, adapter: str) -> None:
    def fresh() -> PeftModel:
        return _fresh(backbone, adapter, train_layer_norms=True, save_dtype=save_dtype)

    straight = fresh()
    trainer = _trainer(straight, tmp_path / "straight")
    trainer.train()
    checkpoint = tmp_path / "straight" / "checkpoint-5"
    first = checkpoint if adapter == "default" else checkpoint / adapter
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {path.name for path in first.iterdir()}
    assert not (first / "model.safetensors").exists()
    resumed = fresh()
    assert not torch.allclose(run(resumed.eval(), ROWS), run(straight.eval(), ROWS), atol=1e-3)
    _trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))
    trained = adapter_parameters(straight, adapter)
    assert trained
    assert all(torch.equal(value, trained[name]) for name, value in adapter_parameters(resumed, adapter).items())
    # What is saved to be used is rounded, as the config asks.
    trainer.save_model(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").rglob("adapter_model.safetensors")
    values = next(tensor for name, tensor in load_file(file).items() if name.endswith("child_values"))
    assert values.dtype == getattr(torch, save_dtype or "float32")


def test_cards_written_by_trainer_keep_the_loading_section(backbone: str, tmp_path) -> None:
    model = _fresh(backbone, id2label={0: "low", 1: "high"})
    trainer = _trainer(model, tmp_path / "run", num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card()
        card = (tmp_path / "run" / "README.md").read_text()
        assert "### Training hyperparameters" in card  # it is Trainer's
        assert "library_name: peft" in card
        assert card.count("## How to load") == 1
        assert "Labels: low, high." in card
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copied")
    assert "## How to load" in (tmp_path / "copied" / "README.md").read_text()
    model.add_adapter("other", SpartanConfig(**SMALL, num_labels=3))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "other")
    assert "## How to load" in (tmp_path / "other" / "other" / "README.md").read_text()
    assert "## How to load" not in (tmp_path / "other" / "README.md").read_text()


def test_the_best_model_is_loaded_at_the_end(backbone: str, tmp_path) -> None:
    model = _fresh(backbone)
    trainer = _trainer(
        model,
        tmp_path / "run",
        num_train_epochs=4,
        learning_rate=0.1,  # too high, so that the last epoch is not the best
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_total_limit=2,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)
    best = PeftModel.from_pretrained(
        hf.BertForSequenceClassification.from_pretrained(backbone), trainer.state.best_model_checkpoint
    )
    assert torch.equal(run(best, ROWS), run(model.eval(), ROWS))


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_accumulation_steps": 2, "bf16": True}],
)
def test_trainer_options_learn(backbone: str, tmp_path, settings: dict) -> None:
    model = _fresh(backbone, load_balancing_coef=0.01)
    settings |= {"num_train_epochs": 8, "learning_rate": 4e-2, "save_strategy": "no", "gradient_checkpointing": True}
    trainer = _trainer(model, tmp_path / "run", **settings)
    trainer.eval_dataset = trainer.train_dataset  # whether it learns, not what
    before = trainer.evaluate()["eval_loss"]
    backbone_before = {n: p.clone() for n, p in model.named_parameters() if ".default." not in n}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert all(torch.equal(p, backbone_before[n]) for n, p in model.named_parameters() if n in backbone_before)


def test_checkpoints_of_a_second_task_leave_the_first_alone(backbone: str, tmp_path) -> None:
    model = _fresh(backbone)
    expected = run(model.eval(), ROWS)
    model.add_adapter("second", SpartanConfig(**SMALL, num_labels=3))
    model.set_adapter("second")
    trainer = _trainer(model, tmp_path / "run", num_train_epochs=1)
    trainer.train_dataset = _Rows(40, num_labels=3)
    trainer.train()
    model.set_adapter("default")
    assert torch.equal(run(model.eval(), ROWS), expected)


def test_a_trained_adapter_of_a_quantized_backbone(backbone: str, tmp_path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = hf.BertForSequenceClassification.from_pretrained(
        backbone, quantization_config=config, device_map={"": "cpu"}
    )
    model = adapted(base, random=False)
    trainer = _trainer(model, tmp_path / "run", num_train_epochs=3, learning_rate=2e-2, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.cluster
def test_the_example_trains_on_the_built_in_topics_in_two_processes(tmp_path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    model = str(save_tiny_backbone(tmp_path / "model"))
    out = tmp_path / "out"
    command = [sys.executable, *launcher, str(EXAMPLE), model, "--output_dir", str(out), "--max_steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "eval_loss" in result.stdout
    assert "trainable params" in result.stdout
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_labels"] == len(config["id2label"]) > 2
    loaded = PeftModel.from_pretrained(hf.AutoModelForSequenceClassification.from_pretrained(model), out)
    assert run(loaded, {"input_ids": torch.tensor([[2, 8, 3]])}).shape == (1, config["num_labels"])
