"""Adapters coming, going and taking turns, through PEFT's and transformers' own interfaces."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PeftModel, convert_to_lora, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter
from tests.models import (
    ARCHITECTURES,
    METHODS,
    SMALL,
    adapted,
    adapter_parameters,
    add,
    answers,
    build,
    randomize,
    run,
    save_backbone,
    task_layers,
)

from sparsepeft import HeadConfig, SpartanConfig
from sparsepeft.tuners.spartan import IMPLS

INPUTS = ARCHITECTURES["bert"].inputs()
TASK_METHODS = METHODS | {"head": HeadConfig}


def _trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_importing_registers_the_methods_and_patches_nothing() -> None:
    code = """
import inspect, peft, peft.mapping, peft.peft_model, peft.tuners.tuners_utils, peft.utils.other, transformers
modules = (peft.mapping, peft.peft_model, peft.tuners.tuners_utils, peft.utils.other, peft.utils.save_and_load)
def members():
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isclass(value) or inspect.isfunction(value):
                inside = {k: id(v) for k, v in vars(value).items()} if inspect.isclass(value) else None
                found[module.__name__, name] = (id(value), inside)
    return found
before = members()
assert "SPARTAN" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
import sparsepeft
assert members() == before
assert sparsepeft.SpartanConfig is peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SPARTAN"]
assert members() == before
"""
    environment = os.environ | {"SPARSEPEFT_AUTOLOAD": "0"}  # where the package is installed, PEFT knows it anyway
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", [*METHODS, "head"])
def test_the_status_of_model_and_layers_names_the_type(method: str) -> None:
    make = METHODS.get(method, HeadConfig)
    model = adapted("bert", config=make())
    status = model.get_model_status()
    assert status.peft_types == {"default": model.peft_config["default"].peft_type.value}
    assert status.adapter_model_type == type(model.base_model).__name__
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    kinds = {layer.module_type for layer in model.get_layer_status()}
    assert kinds == {type(layer).__name__ for layer in task_layers(model)} | {"HeadModule"}
    injected = inject_adapter_in_model(make(), build("bert"))
    assert {layer.module_type for layer in get_layer_status(injected)} == kinds
    assert get_model_status(injected).requires_grad == status.requires_grad == {"default": True}


def test_memories_of_different_sizes_take_turns_on_one_backbone() -> None:
    sizes = {"small": SMALL, "large": {"num_parents": 12, "num_children": 4, "top_k": 7}, "one": {"num_parents": 3}}
    sizes["one"] |= {"num_children": 1, "top_k": 2, "layers_to_transform": 1}
    model = adapted("bert", "small")
    for adapter in ("large", "one"):
        add(model, adapter, **sizes[adapter])
    alone = answers(model, INPUTS, *sizes)
    for adapter, values in sizes.items():
        assert torch.equal(run(adapted("bert", adapter, **values), INPUTS), alone[adapter])
    assert len({tuple(answer.flatten().tolist()) for answer in alone.values()}) == 4  # with the bare backbone's
    counts = {adapter: model.base_model.parameter_formula(adapter)[1] for adapter in sizes}  # of layers it extends
    assert counts == {"small": 6 * 5 * 32 * 3, "large": 12 * 9 * 32 * 3, "one": 3 * 3 * 32}


@pytest.mark.parametrize("active", ["one", "two"])
def test_the_active_adapter_alone_trains_also_after_others_are_added(active: str) -> None:
    model = adapted("bert", "one").train()
    add(model, "two")
    model.set_adapter(active)
    add(model, "three")
    assert model.active_adapter == active
    for name in (active, "three", active):
        model.set_adapter(name)
        assert _trainable(model) == {n for n, _ in model.named_parameters() if f".{name}." in n} != set()
    model.set_adapter("two", inference_mode=True)
    assert not _trainable(model)


def test_switching_adapters_off_and_on_keeps_what_is_trainable() -> None:
    model = adapted("bert")
    model.add_adapter("frozen", SpartanConfig(**SMALL, inference_mode=True))
    trainable = _trainable(model)
    assert trainable
    assert model.get_model_status().enabled is True
    with model.disable_adapter():
        assert not _trainable(model)
        assert model.get_model_status().enabled is False
    assert _trainable(model) == trainable
    model.set_adapter("frozen", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not _trainable(model)


def test_adapters_that_cannot_be_together_are_refused() -> None:
    model = adapted("bert", "one")
    add(model, "two")
    with pytest.raises(ValueError, match="adapter_names"):
        model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", HeadConfig())


def test_deleting_an_inactive_adapter_changes_no_answer() -> None:
    model = adapted("bert", "one")
    add(model, "two")
    expected = run(model, INPUTS)
    model.delete_adapter("two")
    assert list(model.peft_config) == ["one"]
    assert not any("two" in name for name, _ in model.named_parameters())
    assert torch.equal(run(model, INPUTS), expected)
    assert _trainable(model)
    with pytest.raises(ValueError, match="nothing"):
        model.delete_adapter("nothing")


def test_deleting_the_active_adapter_makes_one_other_active_in_every_layer() -> None:
    model = adapted("bert", "first", layers_to_transform=[0])
    add(model, "second", layers_to_transform=[1])
    add(model, "third", num_labels=4)
    expected = answers(model, INPUTS, "first", "second", "third")
    model.set_adapter("first")
    with pytest.warns(UserWarning, match="'second' is active"):
        model.delete_adapter("first")
    assert model.active_adapter == "second"
    assert torch.equal(run(model, INPUTS), expected["second"])
    with pytest.warns(UserWarning, match="'third' is active"):
        model.delete_adapter("second")
    assert torch.equal(run(model, INPUTS), expected["third"])
    assert model.config.num_labels == 4


def test_deleting_the_last_adapter_leaves_the_bare_backbone_and_a_new_one_can_come() -> None:
    expected = run(build("bert"), INPUTS)
    model = adapted("bert", num_labels=5)
    with pytest.warns(UserWarning, match=r"no adapter is left: call unload\(\) for the bare backbone, or add"):
        model.delete_adapter("default")
    assert torch.equal(run(model.base_model.model, INPUTS), expected)
    assert model.config.num_labels == 2
    add(model, "next", num_labels=3)
    model.set_adapter("next")
    assert run(model, INPUTS).shape == (3, 3)
    with warnings.catch_warnings():  # nor does PEFT complain after unload
        warnings.simplefilter("error", UserWarning)
        again = get_peft_model(model.unload(), SpartanConfig(**SMALL)).eval()
    randomize(again)
    assert torch.equal(run(again, INPUTS), run(adapted("bert"), INPUTS))


def test_without_an_adapter_a_model_of_a_task_answers_as_the_warning_says() -> None:
    model = adapted("bert", task_type="SEQ_CLS")
    with pytest.warns(
        UserWarning, match=r"call unload\(\) for the bare backbone, or add one and pass it to set_adapter"
    ):
        model.delete_adapter("default")
    with pytest.raises(KeyError, match="default"):  # of PEFT, which keeps the name of the deleted one
        model(**INPUTS)
    add(model, "next", task_type="SEQ_CLS", num_labels=3)
    model.set_adapter("next")
    assert run(model, INPUTS).shape == (3, 3)
    with pytest.warns(UserWarning, match="no adapter is left"):
        model.delete_adapter("next")
    assert torch.equal(run(model.unload(), INPUTS), run(build("bert"), INPUTS))


def test_merging_refuses_with_the_reason_and_the_alternative() -> None:
    model = adapted("bert")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"depends on each input.*unload\(\)"):
            merge()
    assert not torch.equal(run(model, INPUTS), run(build("bert"), INPUTS))


@pytest.mark.parametrize("method", TASK_METHODS)
def test_what_cannot_work_is_refused_by_name_and_embeddings_may_be_passed_instead_of_tokens(
    method: str, tmp_path
) -> None:
    config = TASK_METHODS[method]()
    model = adapted("bert", config=config)
    embeddings = model.get_input_embeddings()(INPUTS["input_ids"])
    found = run(model, {"inputs_embeds": embeddings, "attention_mask": INPUTS["attention_mask"]})
    assert torch.equal(found, run(model, INPUTS))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    with pytest.raises(TypeError, match="LoRA conversion"):
        convert_to_lora(model, rank=2)
    with pytest.raises(ValueError, match="PeftMixedModel"):
        get_peft_model(build("bert"), config, mixed=True)
    # Here ``replicate`` of DataParallel asks each module for a copy, before it touches a device.
    with pytest.raises(RuntimeError, match="accelerate launch"):
        [module._replicate_for_data_parallel() for module in model.modules()]
    add(model, "two", config=TASK_METHODS[method]())
    with pytest.raises(ValueError, match=r"add_weighted_adapter: .*adapter_names"):
        model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "both")


@pytest.mark.parametrize("method", METHODS)
def test_another_adapters_config_can_be_used_again(method: str) -> None:
    model = adapted("bert", "one", config=METHODS[method]())
    model.add_adapter("two", model.peft_config["one"])
    assert model.base_model.parameter_formula("two") == model.base_model.parameter_formula("one")
    assert model.peft_config["two"].formula == model.peft_config["one"].formula
    assert len(adapter_parameters(model, "two")) == len(adapter_parameters(model, "one"))


def test_a_config_can_be_used_for_several_models() -> None:
    config = SpartanConfig(**SMALL)
    before = copy.deepcopy(config.to_dict())
    first = get_peft_model(build("bert"), config)
    torch.manual_seed(5)
    other = ARCHITECTURES["bert"].build()  # other values, other labels: neither may be held against the config
    other.config.num_labels = 2
    second = get_peft_model(other, config)
    assert first.peft_config["default"].backbone_fingerprint != second.peft_config["default"].backbone_fingerprint
    assert config.to_dict() | {"base_model_name_or_path": None} == before  # PEFT's own note
    second.add_adapter("again", config)
    assert second.peft_config["again"] is not second.peft_config["default"]


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_independent_and_the_whole_model_can_be_pickled(method: str, tmp_path) -> None:
    model = adapted("bert", config=METHODS[method](num_labels=3))
    expected = run(model, INPUTS)
    model(**INPUTS)  # with gradients: must leave nothing behind that a copy could not take
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, INPUTS), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert not torch.equal(run(copied, INPUTS), expected)
    assert torch.equal(run(model, INPUTS), expected)
    with copied.disable_adapter():
        assert copied.config.num_labels == 2
        assert model.config.num_labels == 3
        assert torch.equal(run(model, INPUTS), expected)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded, INPUTS), expected)
    assert loaded.config.num_labels == 3


def test_a_wrapped_layer_looks_like_the_layer() -> None:
    layer = task_layers(adapted("gemma"))[0]
    assert layer.self_attn is layer.base_layer.self_attn
    with pytest.raises(AttributeError):
        _ = layer.no_such_attribute


def test_a_pipeline_uses_the_active_adapters_labels() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    model = adapted("bert", "moods", id2label={0: "sad", 1: "glad", 2: "calm"})
    add(model, "topics", id2label={0: "news", 1: "sport"})
    classify = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    model.set_adapter("moods")
    assert {entry["label"] for entry in classify("a b", top_k=None)} == {"sad", "glad", "calm"}
    model.set_adapter("topics")
    assert {entry["label"] for entry in classify("a b", top_k=None)} == {"news", "sport"}


def test_top_k_of_one_warns_and_gives_parents_no_gradient() -> None:
    with pytest.warns(UserWarning, match="no gradient"):
        config = SpartanConfig(num_parents=4, num_children=2, top_k=1)
    model = get_peft_model(build("bert"), config)
    randomize(model)
    model(**INPUTS).logits.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "spartan_memory" in n}
    assert all(g.abs().max() < 1e-6 for n, g in gradients.items() if n.endswith("parent_keys"))
    assert all(g.abs().max() > 1e-6 for n, g in gradients.items() if n.endswith("child_keys"))


def test_every_default_starts_values_at_zero_and_keys_without_gradient() -> None:
    model = get_peft_model(build("bert"), SpartanConfig())
    model(**INPUTS).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("child_values"):
            assert not parameter.any()
            assert parameter.grad.any()
        elif name.endswith("_keys"):
            assert parameter.any()
            assert not parameter.grad.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_parents": 0}, "num_parents"),
        ({"num_children": 1.5}, "num_children"),
        ({"top_k": 17}, "top_k=17"),
        ({"top_k": True}, "top_k"),
        ({"temperature": 0}, "temperature"),
        ({"load_balancing_coef": -1}, "load_balancing_coef"),
        ({"impl": "fast"}, "impl"),
        ({"parent_keys": "pairs"}, "parent_keys"),
        ({"parent_keys": "product", "num_parents": 17}, "num_parents=17.*square, such as 16 or 25"),
        ({"parent_keys": "product", "impl": "triton"}, "its kernel has neither"),
        ({"sparse_gradients": "yes"}, "sparse_gradients='yes'"),
        ({"sparse_gradients": True, "impl": "reference"}, "impl='reference', which has none"),
        ({"head_type": "mlp"}, "head_type"),
        ({"save_dtype": "int4"}, "save_dtype"),
        ({"num_labels": 0}, "num_labels"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "id2label"),
        ({"format_version": 99}, "upgrade sparsepeft"),
        ({"num_parent": 3}, "num_parent"),
        ({"layers_to_transform": [0, 1.5]}, "layers_to_transform=1.5.*whole number of at least 0"),
        ({"layers_to_transform": -1}, "layers_to_transform=-1.*whole number of at least 0"),
        ({"layers_to_transform": "all"}, "layers_to_transform='all'"),
        ({"head_modules": "classifier"}, "head_modules='classifier'.*list of names"),
        ({"head_modules": {"classifier"}}, "head_modules={'classifier'}.*no order; pass a list"),
        ({"target_modules": [1]}, "target_modules=.*list of names"),
    ],
)
def test_a_wrong_config_says_which_field(wrong: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SpartanConfig(**wrong)


def test_each_implementation_that_a_memory_takes_is_named() -> None:
    for impl in IMPLS:
        assert SpartanConfig(impl=impl).impl == impl
        assert f'``"{impl}"``' in (SpartanConfig.__doc__ or "").partition(" impl: ")[2]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"layers_to_transform": range(2)}, [0, 1]),
        ({"layers_to_transform": (1,)}, [1]),
        ({"layers_to_transform": {2, 0}}, [0, 2]),
        ({"layers_to_transform": np.arange(1, 3)}, [1, 2]),
        ({"layers_to_transform": [np.int64(2)]}, [2]),
        ({"layers_to_transform": np.int64(2)}, 2),
        ({"head_modules": ("bert.pooler", np.str_("classifier"))}, ["bert.pooler", "classifier"]),
        ({"target_modules": frozenset({"layer.1", "layer.0"})}, ["layer.0", "layer.1"]),
        ({"num_labels": np.int64(3)}, 3),
        ({"num_parents": np.int64(4)}, 4),
        ({"temperature": np.float32(0.5)}, 0.5),
        ({"train_layer_norms": np.True_}, True),
    ],
)
def test_what_json_cannot_hold_is_made_plain(given: dict, plain: Any, tmp_path) -> None:
    (name,) = given
    config = SpartanConfig(**(SMALL | given))
    assert getattr(config, name) == plain
    assert type(getattr(config, name)) is type(plain)
    model = adapted("bert", config=config)
    model.save_pretrained(tmp_path)
    assert getattr(SpartanConfig.from_pretrained(tmp_path), name) == plain
    assert torch.equal(run(PeftModel.from_pretrained(build("bert"), tmp_path), INPUTS), run(model, INPUTS))


def test_training_the_head_alone_is_a_method_too(tmp_path) -> None:
    model = get_peft_model(build("roberta"), HeadConfig(num_labels=3)).eval()
    randomize(model)
    assert all("modules_to_save.default" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("roberta"), tmp_path)
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    with loaded.disable_adapter():
        assert torch.equal(run(loaded, INPUTS), run(build("roberta"), INPUTS))
    loaded.add_adapter("other", HeadConfig(num_labels=5))
    loaded.set_adapter("other")
    assert run(loaded, INPUTS).shape == (3, 5)
    with pytest.warns(UserWarning, match="'default' is active"):
        loaded.delete_adapter("other")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    loaded.add_adapter("third", HeadConfig())
    loaded.delete_adapter("third")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))


# -- transformers' own interface ---------------------------------------------------------------------------------------


def test_transformers_adds_switches_and_deletes_adapters() -> None:
    expected = run(build("bert"), INPUTS)
    model = build("bert")
    model.add_adapter(SpartanConfig(**SMALL, num_labels=3), "one")
    randomize(model, "one")
    model.add_adapter(SpartanConfig(**SMALL), "two")
    randomize(model, "two")
    assert model.active_adapters() == ["two"]
    for name, labels in (("two", 2), ("one", 3)):
        model.set_adapter(name)
        answer = run(model, INPUTS)
        assert answer.shape == (3, labels)
        assert model.config.num_labels == labels
        assert torch.equal(answer, run(adapted("bert", name, num_labels=labels), INPUTS))
    model.disable_adapters()
    assert model.config.num_labels == 2
    assert torch.equal(run(model, INPUTS), expected)
    model.enable_adapters()
    assert model.config.num_labels == 3
    assert torch.equal(run(model, INPUTS), answer)
    model.delete_adapter("two")
    assert torch.equal(run(model, INPUTS), answer)
    model.delete_adapter("one")
    assert torch.equal(run(model, INPUTS), expected)
    assert model.config.num_labels == 2


@pytest.mark.parametrize("options", [{}, {"train_layer_norms": True, "num_labels": 3}, {"head_type": "linear"}])
def test_transformers_loads_what_peft_saved(tmp_path, options: dict) -> None:
    model = adapted("bert", **options)
    model.save_pretrained(tmp_path)
    loaded = build("bert")
    loaded.load_adapter(str(tmp_path), adapter_name="task")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    assert loaded.config.num_labels == model.config.num_labels


def test_peft_loads_what_transformers_saved(tmp_path) -> None:
    model = build("bert")
    model.add_adapter(SpartanConfig(**SMALL, num_labels=3))
    randomize(model)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_transformers_from_pretrained_finds_the_adapter_in_a_folder(tmp_path) -> None:
    backbone = save_backbone("bert", tmp_path / "backbone")
    model = adapted(hf.AutoModelForSequenceClassification.from_pretrained(backbone))
    model.save_pretrained(tmp_path / "task")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "task")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
