"""Training on the cached outputs of frozen layers: the same training, with those layers run once per example."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from safetensors.torch import load_file
from tests.models import METHODS, adapted
from tests.tiny import Interrupt, run_config, save_tiny_backbone
from torch import nn
from transformers.models.bert.modeling_bert import BertAttention

from sparsepeft import HeadConfig
from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED
from sparsepeft.runs.held_out import load_task_data
from sparsepeft.training import fit, train
from sparsepeft.training.caching import INDEX, STATES, CachingCollator, FrozenLayerCache, frozen_blocks
from sparsepeft.training.data import prepare_data
from sparsepeft.training.model import build_model

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WEIGHTS = "adapter_model.safetensors"
UPPER = {
    "spartan": {"method": "spartan", "settings": {"layers_to_transform": [2]}},
    "pfeiffer": {"method": "pfeiffer", "settings": {"layers_to_transform": [1, 2]}},
    "norms": {"method": "spartan", "settings": {"layers_to_transform": [2], "train_layer_norms": True}},
    "head": {"method": "head"},
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three layers without dropout, so that training with and without the cache sees the same states."""
    folder, no_dropout = tmp_path_factory.mktemp("backbones"), {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    llama = lambda **config: hf.LlamaModel(hf.LlamaConfig(**config))  # noqa: E731
    gpt2 = lambda **config: hf.GPT2Model(hf.GPT2Config(**config, **no_dropout))  # noqa: E731
    return {
        "bert": save_tiny_backbone(folder / "bert", num_hidden_layers=3, **NO_DROPOUT),
        "llama-left": save_tiny_backbone(folder / "left", num_hidden_layers=3, build=llama, padding_side="left"),
        "gpt2-right": save_tiny_backbone(folder / "right", num_hidden_layers=3, build=gpt2),
    }


def _prepare(backbone: Path, folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The model, encoded training data and collator of a run."""
    config = run_config(backbone, folder, **changes)
    data = prepare_data(config)
    return build_model(config, data).model, data.train, data.collator


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama-left", "gpt2-right"])
def test_a_batch_has_the_states_that_the_frozen_layers_would_give_it(
    backbones: dict[str, Path], tmp_path: Path, name: str
) -> None:
    model, rows, collator = _prepare(backbones[name], tmp_path, few_shot=30, **UPPER["spartan"])
    cache = FrozenLayerCache(model, tmp_path / "states.bin")
    assert [block.index for block in cache.blocks] == [0, 1]
    cached = CachingCollator(collator, cache)
    rows = cache.fill(rows, cached, batch_size=7)
    batch = cached([rows[index] for index in (3, 29, 0, 11)])
    states = batch.pop(STATES)
    plain = collator([{k: v for k, v in rows[index].items() if k != INDEX} for index in (3, 29, 0, 11)])
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in batch)
    mask = batch["attention_mask"].bool()
    assert not mask.all()  # or padding was not tried
    with torch.no_grad():
        expected = model.eval()(**plain, output_hidden_states=True).hidden_states[2]
    # Batches of other sizes and lengths add up in another order: a few roundings of float32.
    torch.testing.assert_close(states[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert not states[~mask].any()
    with torch.no_grad(), cache.attached(), cache.using(states):
        found = model(**plain)
    torch.testing.assert_close(found.loss, model(**plain).loss, rtol=1e-5, atol=1e-6)


def _structure(model: nn.Module) -> list[tuple[str, int, bool, int]]:
    modules = model.named_modules()
    return [(name, id(module), "forward" in vars(module), len(module._forward_hooks)) for name, module in modules]


def test_the_model_is_as_it_was_afterwards_even_after_an_error(backbones: dict[str, Path], tmp_path: Path) -> None:
    model, rows, collator = _prepare(backbones["bert"], tmp_path, few_shot=10, **UPPER["spartan"])
    before, batch = _structure(model), collator([rows[0], rows[1]])
    expected = model.eval()(**batch).logits
    cache = FrozenLayerCache(model, tmp_path / "states.bin")
    for _ in range(2):  # a cache can be attached again
        states = torch.randn(2, batch["input_ids"].shape[1], 32)
        with cache.attached(), cache.using(states):
            assert _structure(model) != before
            assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
        with pytest.raises(ValueError, match="exactly one"), cache.attached(), cache.using(states):
            model()
        assert _structure(model) == before
        assert torch.equal(model(**batch).logits, expected)
    with cache.attached(), cache.using(None):
        assert torch.equal(model(**batch).logits, expected)
    for training in (True, False):
        model.train(training)
        cache.fill(rows, collator)
        assert model.training is training
        assert _structure(model) == before


def test_weights_that_accelerate_offloads(backbones: dict[str, Path], tmp_path: Path) -> None:
    model, rows, collator = _prepare(backbones["bert"], tmp_path, few_shot=10, **UPPER["spartan"])
    batch = collator([rows[0], rows[1]])
    expected = model.eval()(**batch).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    cache = FrozenLayerCache(model, tmp_path / "states.bin")
    cached = CachingCollator(collator, cache)
    rows = cache.fill(rows, cached)
    states = cached([rows[0], rows[1]])[STATES]
    with torch.no_grad(), cache.attached(), cache.using(states):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**batch).logits, expected)  # its hooks are in place again


@pytest.mark.parametrize(
    ("name", "config", "lowest"),
    [
        ("bert", HeadConfig(), 3),
        ("llama-seqcls", HeadConfig(), 3),
        ("bert", METHODS["spartan"](layers_to_transform=[1]), 1),
        ("bert", METHODS["spartan"](layers_to_transform=[1], train_layer_norms=True), 1),
        ("llama-seqcls", METHODS["houlsby"](layers_to_transform=[2]), 2),
        ("bert", METHODS["bitfit"](layers_to_transform=[1, 2]), 1),
        ("albert", HeadConfig(), 1),
    ],
)
def test_the_frozen_layers_are_those_below_the_lowest_trained_one(name: str, config: Any, lowest: int) -> None:
    assert [block.index for block in frozen_blocks(adapted(name, config=config))] == list(range(lowest))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("bert", METHODS["spartan"](), "layer.0 is trained.*layers_to_transform"),
        ("bert", METHODS["pfeiffer"](layers_to_transform=[0, 2]), "layer.0 is trained"),
        ("bert", METHODS["spartan"](train_layer_norms=True), "is trained, so there is nothing below"),
        ("bart-seqcls", METHODS["spartan"](layers_to_transform=[2]), "more than one stack"),
        ("bart-seqcls", HeadConfig(), "more than one stack"),
    ],
)
def test_where_nothing_can_be_cached_the_error_says_why(name: str, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"cache_frozen_layers.*{message}"):
        frozen_blocks(adapted(name, config=config))


# -- whole runs --------------------------------------------------------------------------------------------------------


@contextmanager
def _rows_through_layers() -> Iterator[Counter[tuple[int, bool]]]:
    """Counts rows by layer and whether the layer was training."""
    rows: Counter[tuple[int, bool]] = Counter()

    def count(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(module, BertAttention):  # a layer that is left out is called, but does nothing
            rows[module.self.layer_idx, module.training] += len(args[0])

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


class Losses(hf.TrainerCallback):
    """Keeps the logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.values += [value for key, value in (logs or {}).items() if key == "loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what"), [("bert", "spartan"), ("bert", "norms"), ("llama-left", "pfeiffer"), ("gpt2-right", "head")]
)
def test_training_is_the_same_with_and_without(
    backbones: dict[str, Path], tmp_path: Path, name: str, what: str
) -> None:
    weights, losses, results = {}, {}, {}
    for cached in (False, True):
        folder, log = tmp_path / str(cached), Losses()
        run = run_config(backbones[name], folder, few_shot=40, cache_frozen_layers=cached, **UPPER[what])
        results[cached] = train(run, callbacks=[log])
        weights[cached], losses[cached] = load_file(folder / WEIGHTS), log.values
        assert not (folder / UNFINISHED).exists()
    assert len(losses[True]) >= 5
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    for part, metrics in results[False]["metrics"].items():
        assert results[True]["metrics"][part] == pytest.approx(metrics)
    assert weights[True].keys() == weights[False].keys()
    # Adam moves a weight by up to the learning rate however small its gradient is, so that roundings in gradients near
    # zero show; what the 12 steps did agrees to a hundredth of one of them.
    step = run.recipe_values().learning_rate
    for key, tensor in weights[False].items():
        torch.testing.assert_close(weights[True][key], tensor, rtol=0, atol=0.01 * step)


@pytest.mark.slow
def test_frozen_layers_run_once_per_example_and_for_evaluation(backbones: dict[str, Path], tmp_path: Path) -> None:
    run = run_config(backbones["bert"], tmp_path, max_train_samples=60, cache_frozen_layers=True, **UPPER["spartan"])
    with _rows_through_layers() as rows:
        results = train(run)
    data = load_task_data(run)
    selection = 60 - results["num_train"]
    num_evaluations = 6  # 12 steps, every second
    evaluated = num_evaluations * selection + len(data.validation) + len(data.test or ())
    assert rows[0, True] == rows[1, True] == 0
    steps_per_epoch = -(-results["num_train"] // 8)
    assert rows[2, True] == results["num_train"] + 8 * (12 - steps_per_epoch)
    assert rows[0, False] == rows[1, False] == results["num_train"] + evaluated
    assert results["best_step"] is not None


@pytest.mark.slow
def test_an_interrupted_run_resumes(backbones: dict[str, Path], tmp_path: Path) -> None:
    values = {"max_train_samples": 60, "cache_frozen_layers": True} | UPPER["spartan"]

    def run(folder: str) -> Any:
        return run_config(backbones["bert"], tmp_path / folder, **values)

    whole = train(run("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(run("cut"), callbacks=[Interrupt(7)])
    (states,) = tmp_path.glob("cut/*/checkpoints/*.bin")
    os.truncate(states, states.stat().st_size // 3)  # they are computed anew
    resumed = train(run("cut"))
    assert resumed["metrics"] == whole["metrics"]
    for name, tensor in load_file(tmp_path / "whole" / WEIGHTS).items():
        torch.testing.assert_close(load_file(tmp_path / "cut" / WEIGHTS)[name], tensor)


class _Filled(Exception):
    """Ends a run where its cache would be filled."""


def test_the_cache_is_filled_where_the_model_trains(
    backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[nn.Module, str | None]] = []

    def fill(cache: FrozenLayerCache, *args: Any, **kwargs: Any) -> None:
        assert moved == [(cache.model, "cpu")]
        raise _Filled

    monkeypatch.setattr(fit, "to_accelerator", lambda model, device: moved.append((model, device)))
    monkeypatch.setattr(FrozenLayerCache, "fill", fill)
    values = {"few_shot": 10, "cache_frozen_layers": True, "device": "cpu"} | UPPER["spartan"]
    with pytest.raises(_Filled):
        train(run_config(backbones["bert"], tmp_path, **values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "embeddings.* is trained"),
        ({"method": "spartan"}, "bert.embeddings.LayerNorm is trained"),
        ({"method": "lora"}, "layer.0.* is trained"),
    ],
)
def test_a_run_that_cannot_use_it_stops_before_training_and_leaves_nothing(
    backbones: dict[str, Path], tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(run_config(backbones["bert"], tmp_path / "run", cache_frozen_layers=True, few_shot=10, **changes))
    assert not (tmp_path / "run").exists()
