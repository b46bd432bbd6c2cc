"""Half-precision, quantized and offloaded backbones under a float32 memory."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tests.models import (
    ARCHITECTURES,
    METHODS,
    SMALL,
    adapted,
    adapter_parameters,
    assert_gradients_close,
    backward_through_everything,
    build,
    cast,
    gradients,
    labelled_inputs,
    randomize,
    run,
    save_backbone,
    task_layers,
    without_dropout,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from sparsepeft import SpartanConfig

INPUTS = ARCHITECTURES["bert"].inputs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "mixtral", "t5"])
def test_a_half_precision_backbone_with_a_float32_memory(name: str, dtype: torch.dtype, tmp_path) -> None:
    inputs = cast(ARCHITECTURES[name].inputs(), dtype)
    expected = run(build(name).to(dtype), inputs)
    model = adapted(build(name).to(dtype), random=False, train_layer_norms=name == "bert")
    assert any("LayerNorm.modules_to_save.default" in n for n, _ in model.named_parameters()) == (name == "bert")
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".default." in n)
    assert all(
        p.dtype == dtype for n, p in model.named_parameters() if ".default." not in n and p.dtype != torch.float32
    )
    fresh = run(model, inputs)
    assert fresh.dtype == expected.dtype
    if ARCHITECTURES[name].has_head:  # head and norms compute in float32: same weights, finer products
        torch.testing.assert_close(fresh, expected, rtol=3e-2, atol=3e-2)
    else:
        assert torch.equal(fresh, expected)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    randomize(model)
    model.train()
    backward_through_everything(model, inputs)
    gradients = {n: p.grad for n, p in model.named_parameters() if "spartan_memory" in n}
    assert all(
        g is not None and g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients.values()
    )
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name).to(dtype), tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert all(p.dtype == torch.float32 for n, p in loaded.named_parameters() if ".default." in n)


def test_the_memory_may_be_kept_in_the_backbones_dtype() -> None:
    model = get_peft_model(build("llama").bfloat16(), SpartanConfig(**SMALL), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for n, p in model.named_parameters() if "spartan_memory" in n)
    assert run(adapted(build("bert").double()), INPUTS).dtype == torch.float64


def test_autocast_trains() -> None:
    model = adapted("bert").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**labelled_inputs("bert")).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# -- quantized ---------------------------------------------------------------------------------------------------------


def _quantized(folder: str, cls: type) -> torch.nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = hf.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return cls.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


@pytest.mark.parametrize(("name", "cls"), [("bert", hf.BertForSequenceClassification), ("llama", hf.LlamaForCausalLM)])
def test_a_torchao_backbone(name: str, cls: type, tmp_path) -> None:
    inputs = ARCHITECTURES[name].inputs()
    folder = save_backbone(name, tmp_path / "backbone")
    expected = run(_quantized(folder, cls), inputs)
    model = adapted(_quantized(folder, cls), random=False)
    assert any(type(p).__module__.startswith("torchao") for p in model.parameters())
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    randomize(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(**labelled_inputs(name)).loss.backward()
    optimizer.step()
    assert before
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.eval().save_pretrained(tmp_path / "task")
    with pytest.warns(UserWarning, match="quantized"):
        loaded = PeftModel.from_pretrained(_quantized(folder, cls), tmp_path / "task")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    with pytest.warns(UserWarning, match="quantized"):
        plain = PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "task")
    torch.testing.assert_close(run(plain, inputs), run(model, inputs), rtol=0.1, atol=0.1)


def test_another_backbone_is_noticed_even_when_quantized(tmp_path) -> None:
    folder = save_backbone("bert", tmp_path / "backbone")
    cls = hf.BertForSequenceClassification
    adapted(cls.from_pretrained(folder)).save_pretrained(tmp_path / "task")
    torch.manual_seed(5)
    other = ARCHITECTURES["bert"].build()
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.add_(1.0)
    save_backbone(other, tmp_path / "other")
    with pytest.raises(ValueError, match="backbone"):
        PeftModel.from_pretrained(_quantized(str(tmp_path / "other"), cls), tmp_path / "task")


def test_a_bitsandbytes_backbone(tmp_path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    folder = save_backbone("llama", tmp_path / "backbone")
    config = hf.BitsAndBytesConfig(load_in_8bit=True)
    model = adapted(hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config))
    model.save_pretrained(tmp_path / "task")
    again = hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    loaded = PeftModel.from_pretrained(again, tmp_path / "task")
    inputs = {k: v.to(model.device) for k, v in ARCHITECTURES["llama"].inputs().items()}
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("used", [False, True])  # use may pack weights anew
@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_that_bitsandbytes_has_quantized(bits: int, used: bool, tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    width = 64  # of a block of 4-bit weights
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": width}
    backbone = hf.RobertaForSequenceClassification(hf.RobertaConfig(**sizes, vocab_size=99))
    folder = save_backbone(backbone, tmp_path / "backbone")
    config = hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    quantized = type(backbone).from_pretrained(folder, quantization_config=config).eval()
    if used:
        quantized.classifier.dense(torch.ones(1, width, device=quantized.device))
    model = get_peft_model(quantized, SpartanConfig(**SMALL))
    head = model.base_model.model.classifier
    assert type(head.original_module.dense).__module__.startswith("bitsandbytes")
    assert type(head.modules_to_save["default"].dense) is torch.nn.Linear
    expected, found = (part.dense.weight.cpu() for part in (backbone.classifier, head.modules_to_save["default"]))
    tolerance = expected.abs().max().item() * {8: 1 / 127, 4: 1 / 6}[bits]  # a step of int8, half of nf4's widest
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


class Int8Params(torch.nn.Parameter):
    """What bitsandbytes calls so: int8 with a scale for each row, of which ``dequantize`` knows nothing."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Int8Params:
        return torch.Tensor._make_subclass(cls, data, requires_grad)

    def __deepcopy__(self, memo: dict) -> Int8Params:
        copied = type(self)(self.data.clone())
        vars(copied).update(vars(self))
        return copied


class Params4bit(Int8Params):
    """Two values in a byte, in a shape of its own."""


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_with_scales_of_its_own_is_copied_with_its_values(bits: int, monkeypatch) -> None:
    """By a stand-in for bitsandbytes, which runs everywhere."""
    backbone = build("roberta")
    dense = backbone.classifier.dense
    values = dense.weight.data
    if bits == 8:
        scales = values.abs().amax(1)
        dense.weight = Int8Params((values / scales[:, None] * 127).round().to(torch.int8))
        dense.weight.SCB, dense.state = scales, SimpleNamespace(SCB=None)
        values = dense.weight.data * scales[:, None] / 127
    else:
        dense.weight = Params4bit(torch.zeros(values.numel() // 2, 1, dtype=torch.uint8))
        dense.weight.quant_state = values
    functional = SimpleNamespace(
        int8_vectorwise_dequant=lambda data, scales: data * scales[:, None] / 127,
        dequantize_4bit=lambda data, quant_state: quant_state,
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(functional=functional))
    head = get_peft_model(backbone, SpartanConfig(**SMALL)).base_model.model.classifier.modules_to_save["default"]
    torch.testing.assert_close(head.dense.weight.data, values)
    assert torch.equal(head.dense.bias, build("roberta").classifier.dense.bias)


class QuantLinear(torch.nn.Module):
    """How GPTQ and others keep a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 32
        self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["another class", "float8", "int8"])
def test_a_head_quantized_in_an_unknown_way_is_refused(kind: str) -> None:
    backbone = build("roberta")
    dense = backbone.classifier.dense
    if kind == "another class":
        backbone.classifier.dense = QuantLinear()
    else:
        dtype = {"float8": torch.float8_e4m3fn, "int8": torch.int8}[kind]
        dense.weight = torch.nn.Parameter(dense.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"'classifier\.dense' was quantized as (QuantLinear|Linear).*leave the head out"
    ):
        get_peft_model(backbone, SpartanConfig(**SMALL))
    assert not any("spartan" in name for name, _ in backbone.named_modules())
    get_peft_model(backbone, SpartanConfig(**SMALL, head_type="linear"))


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    backbone = save_backbone("bert", tmp_path / "backbone")
    model = adapted(hf.BertForSequenceClassification.from_pretrained(backbone))
    model.save_pretrained(tmp_path / "task")
    return backbone, tmp_path / "task", run(model, INPUTS)


DEVICE_MAP = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}


def _offloaded(folder: str, where: str, tmp_path) -> torch.nn.Module:
    if where == "device map":
        return hf.BertForSequenceClassification.from_pretrained(
            folder, device_map=DEVICE_MAP, offload_folder=str(tmp_path / "offload")
        )
    return _offload(hf.BertForSequenceClassification.from_pretrained(folder).eval(), where, tmp_path)


def _offload(model: torch.nn.Module, where: str, tmp_path) -> torch.nn.Module:
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    return model


def test_a_device_map_on_one_device(folders) -> None:
    backbone, task, expected = folders
    model = hf.BertForSequenceClassification.from_pretrained(backbone, device_map={"": "cpu"})
    assert torch.equal(run(PeftModel.from_pretrained(model, task), INPUTS), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(folders, where: str, tmp_path) -> None:
    """Weights wait on the CPU or the disk and are fetched layer by layer; the memory stays where it computes."""
    backbone, task, expected = folders
    model = _offloaded(backbone, where, tmp_path)
    assert all(p.device.type == "meta" for p in model.bert.encoder.parameters())
    bare = run(model, INPUTS)
    loaded = PeftModel.from_pretrained(model, task)
    assert all(p.device.type == "cpu" for n, p in loaded.named_parameters() if ".default." in n)
    assert torch.equal(run(loaded, INPUTS), expected)
    with loaded.disable_adapter():  # the adapter's norms and head are no longer the tensors that wait
        assert torch.equal(run(loaded, INPUTS), bare)
    assert any(p.device.type == "meta" for p in loaded.parameters())
    whole = PeftModel.from_pretrained(hf.BertForSequenceClassification.from_pretrained(backbone), task)
    assert torch.equal(run(_offload(whole, where, tmp_path / "whole"), INPUTS), expected)


def test_an_offloaded_backbone_is_still_recognised(folders, tmp_path) -> None:
    _, task, _ = folders
    torch.manual_seed(5)
    other = save_backbone(ARCHITECTURES["bert"].build(), tmp_path / "other")
    with pytest.raises(ValueError, match="other values"):
        PeftModel.from_pretrained(_offloaded(other, "disk", tmp_path), task)


def test_a_device_map_with_the_disk(folders, tmp_path) -> None:
    backbone, task, expected = folders
    model = _offloaded(backbone, "device map", tmp_path)
    # Not PeftModel.from_pretrained: it takes the hooks off and looks for each weight under a name without our wrapper.
    loaded = get_peft_model(model, SpartanConfig.from_pretrained(task)).eval()
    set_peft_model_state_dict(loaded, load_file(task / "adapter_model.safetensors"))
    assert torch.equal(run(loaded, INPUTS), expected)


@pytest.mark.parametrize(("where", "method"), [("device map", "spartan"), ("cpu", "bitfit")])
def test_transformers_does_not_load_onto_offloaded_weights(folders, tmp_path, method: str, where: str) -> None:
    backbone, _, _ = folders
    whole = adapted(hf.BertForSequenceClassification.from_pretrained(backbone), config=METHODS[method]())
    whole.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"offloaded.*before offloading"):
        _offloaded(backbone, where, tmp_path).load_adapter(str(tmp_path / "bare"))


@pytest.mark.parametrize("method", METHODS)
def test_training_on_offloaded_weights(method: str, tmp_path) -> None:
    inputs = labelled_inputs("bert")
    expected = gradients(adapted(without_dropout(build("bert")), config=METHODS[method]()).train(), inputs)
    backbone = _offload(without_dropout(build("bert")), "cpu", tmp_path)
    assert_gradients_close(gradients(adapted(backbone, config=METHODS[method]()).train(), inputs), expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_fsdp1_keeps_the_original_parameters_or_refuses(method: str, one_process) -> None:
    """Frozen and trained parameters of a layer cannot be flattened into one: torch says so when it wraps the model."""
    inputs = labelled_inputs("bert")
    expected = gradients(adapted(without_dropout(build("bert")), config=METHODS[method]()).train(), inputs)

    def shard(use_orig_params: bool) -> FullyShardedDataParallel:
        model = adapted(without_dropout(build("bert")), config=METHODS[method]()).train()
        policy = ModuleWrapPolicy({type(task_layers(model)[0])})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=cpu)

    sharded = gradients(shard(use_orig_params=True), inputs)
    found = {name.replace("_fsdp_wrapped_module.", ""): gradient for name, gradient in sharded.items()}
    assert_gradients_close({name: found[name].reshape_as(gradient) for name, gradient in expected.items()}, expected)
    with pytest.raises(ValueError, match="requires_grad"):
        shard(use_orig_params=False)


def test_without_storage_parameters_are_counted() -> None:
    with torch.device("meta"):
        model = get_peft_model(ARCHITECTURES["bert"].build(), SpartanConfig(num_labels=3))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.base_model.parameter_formula()[1] == sum(p.numel() for p in adapter_parameters(model).values())
    assert all(p.device.type == "meta" for p in adapted("bert").to("meta").parameters())


def test_a_memory_without_room_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    with pytest.raises(ValueError, match=r"num_parents=33554432 .* takes \d+\.\d+ GB, .* has 1\.00 GB left"):
        get_peft_model(build("bert"), SpartanConfig(num_parents=1 << 25))
    with torch.device("meta"):  # which needs none
        get_peft_model(build("bert"), SpartanConfig(num_parents=1 << 25))
