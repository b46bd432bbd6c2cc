"""What PEFT's methods put on a sparse model acts there as on the dense one, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from tests.spt.models import DECODERS, ENCODERS, TARGETS, build, inputs, logits, plain_name, sparse

from sparsepeft import BitFitConfig, BottleneckConfig, SpartanConfig
from sparsepeft.spt import sparsification, sparsify


def task(name: str) -> str:
    return "SEQ_CLS" if name in ENCODERS else "CAUSAL_LM" if name in DECODERS else "SEQ_2_SEQ_LM"


def stir(model: Any) -> None:
    """Give what is trained other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def inside(name: str, **values: Any) -> LoraConfig:
    return LoraConfig(target_modules=TARGETS[name], r=3, init_lora_weights=False, **values)


def configs(name: str) -> dict[str, Any]:
    first, *ffn = TARGETS[name]
    return {
        "bias of LoRA": inside(name, lora_bias=True, use_rslora=True, lora_dropout=0.3),
        "biases of the backbone": inside(name, bias="all"),
        "modules_to_save": LoraConfig(target_modules=[first], modules_to_save=ffn),
        "spartan": SpartanConfig(task_type=task(name)),
        "pfeiffer": BottleneckConfig(task_type=task(name)),
        "houlsby": BottleneckConfig(task_type=task(name), style="houlsby"),
        "bitfit": BitFitConfig(task_type=task(name)),
    }


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5-gated"])
def test_methods_act_as_on_the_dense_model(name: str) -> None:
    everything = {"top_l": 1.0, "num_active_blocks": 1.0, "block_assignment": "contiguous"}
    backbone, sparse_backbone = build(name), sparse(name, **everything)
    for method, config in configs(name).items():
        if method == "bitfit" and name == "t5-gated":
            continue  # no biases
        dense = get_peft_model(copy.deepcopy(backbone), copy.deepcopy(config)).eval().double()
        made = get_peft_model(copy.deepcopy(sparse_backbone), copy.deepcopy(config)).eval().double()
        stir(dense)
        trained = {key: parameter for key, parameter in dense.named_parameters() if parameter.requires_grad}
        found = {
            plain_name(key): parameter
            for key, parameter in made.named_parameters()
            if parameter.requires_grad and "spt_router" not in key
        }
        assert found.keys() == {plain_name(key) for key in trained}, method
        with torch.no_grad():
            for key, parameter in trained.items():
                found[plain_name(key)].copy_(parameter)
        expected = logits(dense, name)
        assert not torch.allclose(expected, logits(build(name).double(), name), atol=1e-3), method
        torch.testing.assert_close(logits(made, name), expected, msg=lambda text, method=method: f"{method}: {text}")


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_active_merged_and_disabled_adapters(name: str) -> None:
    model = get_peft_model(sparse(name), inside(name, lora_bias=True), adapter_name="a").eval().double()
    bare = logits(sparse(name).double(), name)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, name), bare)
    alone = logits(model, name)
    model.add_adapter("b", inside(name))
    model.double().base_model.set_adapter(["a", "b"])
    both = logits(model, name)
    assert not torch.allclose(both, alone, atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, name), both)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, name), bare)
    torch.testing.assert_close(logits(model, name), both)


def test_what_cannot_be_computed_block_by_block_is_refused() -> None:
    ffn = ["up_proj", "down_proj"]
    for config, kind in (
        (LoraConfig(target_modules=ffn, use_dora=True), "DoraLinearVariant"),
        (LoraConfig(target_modules=["q_proj"], target_parameters=["down_proj.weight"]), "lora.ParamWrapper"),
        (AdaLoraConfig(target_modules=ffn, total_step=10), "adalora"),
        (IA3Config(target_modules=ffn, feedforward_modules=ffn[1:]), "ia3"),
        (VeraConfig(target_modules=["down_proj"], r=2), "vera"),
    ):
        model = get_peft_model(sparse("llama"), config)
        with pytest.raises(
            ValueError, match=rf"_proj of a sparse FFN carries an adapter that is no plain LoRA \(.*{kind}"
        ):
            logits(model, "llama")
        with model.disable_adapter():
            logits(model, "llama")
    for part, other, values in (
        ("mlp", "q_proj", "routed"),
        ("mlp", "q_proj", "exact"),
        ("self_attn", "up_proj", "exact"),
    ):
        with pytest.raises(ValueError, match="A part of a sparse model was to be copied by itself"):
            get_peft_model(sparse("llama", values=values), LoraConfig(target_modules=[other], modules_to_save=[part]))
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = sparse("llama")
        getattr(model.get_submodule("model.layers.0.mlp.up_proj"), register)(lambda *args: None)
        with pytest.raises(ValueError, match="Something acts on up_proj from outside"):
            logits(model, "llama")


@pytest.mark.parametrize("method", ["lora", "modules_to_save", "spartan", "bitfit"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "t5-gated"])
def test_each_row_of_a_mixed_batch_uses_its_own(name: str, method: str) -> None:
    if method == "bitfit" and name == "t5-gated":
        pytest.skip("no biases")
    config = inside(name, lora_bias=True) if method == "lora" else configs(name)[method]
    model = get_peft_model(sparse(name, compensation_rank=2), copy.deepcopy(config), adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    expected = {}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        stir(model)
    model = model.eval().double()
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        expected[adapter] = logits(model, name)
    with model.disable_adapter():
        expected["__base__"] = logits(model, name)
    names = ["b", "__base__", "a"]
    mixed = logits(model, name, adapter_names=names)
    wanted = torch.stack([expected[adapter][row] for row, adapter in enumerate(names)])
    torch.testing.assert_close(mixed, wanted)
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-3)


def test_generation_of_a_mixed_batch_by_beams() -> None:
    model = get_peft_model(sparse("llama"), inside("llama"), adapter_name="a")
    model.add_adapter("b", inside("llama"))
    model.eval()
    given, options = inputs("llama"), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    mixed = model.generate(**given, **options, adapter_names=["b", "a", "b"])
    for adapter, rows in (("a", [1]), ("b", [0, 2])):
        model.set_adapter(adapter)
        assert torch.equal(mixed[rows], model.generate(**given, **options)[rows])


def test_an_adapter_of_a_model_made_sparse_in_another_way_is_refused(tmp_path: Any) -> None:
    get_peft_model(sparse("llama"), inside("llama")).save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(sparse("llama"), str(tmp_path))
    other_data = sparsify(build("llama"), sparsification(sparse("llama")).config, inputs("llama", batch=5))
    for model, differing in ((sparse("llama", top_l=6), "settings"), (other_data, "neuron_order")):
        with pytest.raises(ValueError, match=rf"made sparse in another way \(its {differing} differs\); load it into"):
            PeftModel.from_pretrained(model, str(tmp_path))


@pytest.mark.parametrize("settings", [{"ffn": False}, {"attention": False}, {"attention": False, "values": "exact"}])
def test_data_parallel_is_refused(settings: dict[str, Any]) -> None:
    """Here ``replicate`` of DataParallel asks each module for a copy, before it touches a device."""
    bare = sparse("llama", **settings)
    for model in (bare, get_peft_model(bare, LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(RuntimeError, match="DataParallel cannot replicate a model with adapters or sparse layers"):
            [module._replicate_for_data_parallel() for module in model.modules()]


def test_copies_of_a_sparse_model_stand_alone() -> None:
    model = sparse("llama", codebook_interval=1).train()
    copied = copy.deepcopy(model)
    optimizer = torch.optim.SGD(copied.parameters(), lr=1e-2)
    before = model.state_dict()["model.layers.0.self_attn.spt.state.original_module.codebooks"].clone()
    for _ in range(2):
        copied(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
        optimizer.step()
    key = "model.layers.0.self_attn.spt.state.original_module.codebooks"
    assert torch.equal(model.state_dict()[key], before)
    assert not torch.equal(copied.state_dict()[key], before)
