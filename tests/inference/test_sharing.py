"""An engine on a model that somebody else is using: it shares the weights and changes nothing."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from tests.inference.conftest import save_task
from tests.models import METHODS
from tests.tiny import save_tiny_backbone, topics_rows
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsepeft import MultiTaskEngine, SptConfig, sparsify
from sparsepeft.errors import UserError
from sparsepeft.inference.views import _offloaded_weights

TEXTS = [row["text"] for row in topics_rows("test")[:3]]


def load(backbone: Path, **options: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(backbone, **options)


def answers(engine: MultiTaskEngine) -> torch.Tensor:
    requests = [(task, text) for task in engine.tasks for text in TEXTS]
    return torch.tensor([one.score for one in engine.predict(requests, on_error="raise")])


def state(model: torch.nn.Module) -> list[Any]:
    """All that an engine could have changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        model.config.to_dict(),
        [p.requires_grad for p in model.parameters()],
        [(id(p), p.device, p.dtype, p.data_ptr(), p.detach().clone().tolist()) for p in model.parameters()],
        [(id(m), type(m), m.training, "forward" in vars(m), sorted(vars(m))) for m in model.modules()],
        [(name, len(getattr(m, name))) for m in model.modules() for name in hooks],
    ]


@pytest.mark.parametrize("onednn", [True, False])
def test_the_model_stays_as_it_was(backbone: Path, folders: dict[str, Path], onednn: bool) -> None:
    model = load(backbone, hidden_dropout_prob=0.5).train()
    model.bert.pooler.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    before, backend = state(model), tokenizer.backend_tokenizer.to_str()
    engine = MultiTaskEngine(model, folders, tokenizer=tokenizer, device="cpu", onednn=onednn)
    found = answers(engine)
    engine.predict_all(TEXTS)
    engine.remove("two")
    assert state(model) == before
    assert tokenizer.backend_tokenizer.to_str() == backend
    torch.testing.assert_close(found, answers(MultiTaskEngine(backbone, folders)), rtol=1e-5, atol=1e-6)


def test_a_decoder_without_padding_stays_as_it_was(tmp_path: Path) -> None:
    build = lambda **config: hf.LlamaModel(hf.LlamaConfig(**config | {"pad_token_id": None}))  # noqa: E731
    backbone = save_tiny_backbone(tmp_path / "backbone", build=build)
    task = save_task(backbone, tmp_path / "task", METHODS["spartan"](num_labels=2))
    model, tokenizer = load(backbone), AutoTokenizer.from_pretrained(backbone, pad_token=None, eos_token="[SEP]")
    before = state(model)
    engine = MultiTaskEngine(model, {"task": task}, tokenizer=tokenizer)
    together = engine.predict([("task", text) for text in TEXTS], on_error="raise")
    alone = [engine.predict([("task", text)])[0].score for text in TEXTS]
    assert [one.score for one in together] == pytest.approx(alone, abs=1e-5)
    assert state(model) == before
    assert tokenizer.pad_token is None


def test_training_goes_on_beside_the_engine(backbone: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(backbone).train()
    engine = MultiTaskEngine(model, folders)
    before = answers(engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = AutoTokenizer.from_pretrained(backbone)(TEXTS, return_tensors="pt", padding=True)
    loss = model(**inputs, labels=torch.tensor([0, 1, 0])).loss
    loss.backward()
    answers(engine)  # between backward and step
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    after = answers(engine)  # the weights are the same ones
    assert not torch.allclose(before, after)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path)
    fresh = {name: save_task(tmp_path, tmp_path / name, METHODS["bitfit"](num_labels=3)) for name in ("one", "two")}
    engines = [MultiTaskEngine(given, fresh) for given in (model, model, tmp_path)]
    for engine in engines[:2]:  # two on one model
        torch.testing.assert_close(answers(engine), answers(engines[2]), rtol=1e-5, atol=1e-6)
    engines[0].remove("one")
    torch.testing.assert_close(answers(engines[1]), answers(engines[2]), rtol=1e-5, atol=1e-6)


CPU = torch.device("cpu")
ON_CPU = ("bert.embeddings", "bert.encoder.layer.1", "bert.pooler", "classifier")
PLACES = dict.fromkeys(ON_CPU, "cpu") | {"bert.encoder.layer.0": "disk"}
OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), execution_device=CPU),
    "dispatch_model": lambda model, folder: dispatch_model(model, PLACES, main_device="cpu", offload_dir=str(folder)),
}


@pytest.mark.filterwarnings("ignore:The backbone .* is quantized or offloaded:UserWarning")
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_weights_stay_where_they_are(
    backbone: Path, folders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    expected = answers(MultiTaskEngine(backbone, folders))
    model = load(backbone)
    OFFLOADED[how](model, tmp_path / "offloaded")
    before, kept = [(id(p), p.device) for p in model.parameters()], set(map(id, _offloaded_weights(model)))
    engine = MultiTaskEngine(model, folders)
    for adapted in engine._views.values():
        assert set(map(id, _offloaded_weights(adapted.model))) == kept != set()
    torch.testing.assert_close(answers(engine), expected, rtol=1e-5, atol=1e-6)
    assert [(id(p), p.device) for p in model.parameters()] == before
    with pytest.raises(UserError, match="accelerate decides"):
        MultiTaskEngine(model, folders, device="cpu")


def test_a_quantized_model_is_shared(backbone: Path, folders: dict[str, Path]) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = load(backbone)
    torchao.quantize_(model.bert.encoder, torchao.Int8WeightOnlyConfig())
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    with pytest.warns(UserWarning, match="quantized"):
        engine = MultiTaskEngine(model, folders, onednn=True)
    for adapted in engine._views.values():
        shared = next(p for n, p in adapted.model.named_parameters() if n.endswith("intermediate.dense.weight"))
        assert type(shared) is type(weight)
        assert shared.qdata.data_ptr() == weight.qdata.data_ptr()
    torch.testing.assert_close(answers(engine), answers(MultiTaskEngine(backbone, folders)), rtol=0.05, atol=0.05)


def test_a_sparse_model_is_left_and_tasks_leave_it(backbone: Path, tmp_path: Path) -> None:
    def num_tensors(engine: MultiTaskEngine) -> tuple[int, int]:
        gc.collect()
        (adapted,) = engine._views.values()
        return len(list(adapted.model.state_dict())), sum(type(one) is nn.Parameter for one in gc.get_objects())

    ids, tokenizer = torch.randint(4, 40, (4, 12)), AutoTokenizer.from_pretrained(backbone)
    model = sparsify(load(backbone), SptConfig(top_l=3, values="routed", num_blocks=4, num_active_blocks=2), ids)
    get_peft_model(copy.deepcopy(model), METHODS["spartan"](num_labels=2)).save_pretrained(str(tmp_path))
    before = state(model)
    engine = MultiTaskEngine(model, {"one": tmp_path}, tokenizer=tokenizer, onednn=False)
    found, loaded = answers(engine), num_tensors(engine)
    for _ in range(2):
        engine.add("two", tmp_path)
        torch.testing.assert_close(answers(engine), found.repeat(2))
        assert num_tensors(engine)[0] == loaded[0]  # PEFT sees no more than before
        engine.remove("two")
        assert num_tensors(engine) == loaded
    assert state(model) == before


@pytest.mark.gpu
@pytest.mark.parametrize(("of_model", "of_engine"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", None)])
def test_an_engine_on_another_device(
    backbone: Path, folders: dict[str, Path], of_model: str, of_engine: str | None
) -> None:
    model = load(backbone).to(of_model)
    engine = MultiTaskEngine(model, folders, device=of_engine)
    assert {p.device.type for p in model.parameters()} == {of_model}
    assert engine._device.type == (of_engine or of_model)
    torch.testing.assert_close(answers(engine), answers(MultiTaskEngine(backbone, folders)), rtol=1e-3, atol=1e-4)


def test_a_device_that_is_not_there_is_refused(backbone: Path) -> None:
    with pytest.raises(UserError, match=r"`device=nowhere` was given, but PyTorch finds only"):
        MultiTaskEngine(backbone, device="nowhere")
