"""Adapters of PEFT's own methods that were trained on a sparse model, on a dense one."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tests.spt.models import TARGETS, build, inputs, logits, sparse

from sparsepeft import SpartanConfig
from sparsepeft.spt import desparsify, load_sparse, save_sparse

FFN = {"attention": False}
ATTENTION = {"ffn": False, "top_l": 6}
WARNING = r"exclude_modules=.*spt_settings.* but no modules were excluded"


def adapted(name: str, adapter: str = "default", settings: dict = FFN, **values) -> PeftModel:
    """A sparse model with LoRA, whose weights are not those that it starts with."""
    lora = LoraConfig(**({"target_modules": TARGETS[name], "r": 3, "init_lora_weights": False} | values))
    model = get_peft_model(sparse(name, "left", **settings), lora, adapter).eval()
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "spt_router.modules_to_save" in parameter_name and parameter.is_floating_point():
            parameter.data += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_dense_model_refuses_what_acts_inside_a_routed_ffn(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    expected = logits(model, name)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"), pytest.warns(UserWarning, match=WARNING):
        PeftModel.from_pretrained(build(name), tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"), pytest.warns(UserWarning, match=WARNING):
        build(name).load_adapter(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = load_sparse(build(name), tmp_path)
    assert torch.equal(logits(again, name), expected)
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert torch.equal(logits(again.eval(), name), expected)
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_auto_classes_refuse_it_too(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    model = adapted("llama", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_files_from_before_are_still_read(tmp_path: Path) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t[0] if t.dim() == 3 and "mlp" in key else t for key, t in load_file(path).items()}, path)
    assert torch.equal(logits(load_sparse(build("llama"), tmp_path), "llama"), logits(model, "llama"))


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (ATTENTION, {}),
        (ATTENTION, {"exclude_modules": ".*layers.1.*"}),
        (FFN, {"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]}),
    ],
)
def test_what_acts_elsewhere_is_loaded_with_a_word(settings: dict, values: dict, tmp_path: Path) -> None:
    model = adapted("llama", settings=settings, **values)
    model.save_pretrained(tmp_path)
    excluded = json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"]
    assert "spt_settings" in excluded
    card = (tmp_path / "README.md").read_text()
    assert "load_sparse(backbone" in card
    again = load_sparse(build("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dense = PeftModel.from_pretrained(build("llama"), tmp_path)
    # PEFT is silent where another of the excluded modules is there.
    assert any(re.search(WARNING, str(each.message)) for each in said) == (not values.get("exclude_modules"))
    values = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    loaded = {name: p for name, p in dense.named_parameters() if ".lora_" in name}
    assert values.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in values.items())


def test_a_config_is_used_on_a_dense_model_afterwards(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["down_proj"], r=3)
    model = get_peft_model(sparse("llama", **FFN), config)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "sparse")
    assert load_file(tmp_path / "sparse" / "adapter_model.safetensors").keys()
    copied.save_pretrained(tmp_path / "copied")
    assert "load_sparse" in (tmp_path / "copied" / "README.md").read_text()
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "dense")
    assert PeftConfig.from_pretrained(tmp_path / "dense").exclude_modules is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(build("llama"), tmp_path / "dense")
    dense = desparsify(model.merge_and_unload())
    assert not dense._load_state_dict_pre_hooks
    dense.load_state_dict(build("llama").state_dict())


@pytest.mark.parametrize("settings", [FFN, ATTENTION])
def test_tensors_that_were_asked_for_leave_no_marks(settings: dict, tmp_path: Path) -> None:
    """As logging, a running mean and processes other than the first ask for them."""
    model = adapted("llama", settings=settings, task_type="CAUSAL_LM")
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    get_peft_model_state_dict(model)
    get_peft_model(build("llama"), copy.deepcopy(config)).save_pretrained(tmp_path / "copied")
    get_peft_model_state_dict(model)
    get_peft_model(build("llama"), config).save_pretrained(tmp_path / "shared")
    get_peft_model_state_dict(model)
    desparsify(model).save_pretrained(tmp_path / "dense")
    get_peft_model_state_dict(model)
    config.save_pretrained(tmp_path / "alone")
    for folder in ("copied", "shared", "dense", "alone"):
        assert PeftConfig.from_pretrained(tmp_path / folder).exclude_modules is None
        card = tmp_path / folder / "README.md"
        assert not card.exists() or "load_sparse" not in card.read_text()
    plain = PeftModel.from_pretrained(build("llama"), tmp_path / "dense").eval()
    assert torch.equal(logits(plain, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("how", ["pickled", "injected"])
def test_adapters_saved_in_other_ways_are_marked_too(how: str, tmp_path: Path) -> None:
    """Pickled, and by transformers, which writes the config first."""
    if how == "pickled":
        model = adapted("llama", task_type="CAUSAL_LM")
        model.save_pretrained(tmp_path, safe_serialization=False)
    else:
        model = sparse("llama", "left", **FFN)
        model.add_adapter(LoraConfig(target_modules=TARGETS["llama"], init_lora_weights=False, task_type="CAUSAL_LM"))
        for _ in range(2):  # the second time over a file that is marked
            model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).exclude_modules == {"spt_settings"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(load_sparse(build("llama"), tmp_path), "llama"), logits(model.eval(), "llama"))


@pytest.mark.parametrize("settings", [FFN, ATTENTION])
@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_are_loaded_too(method: type, settings: dict, tmp_path: Path) -> None:
    model = get_peft_model(sparse("llama", **settings), method(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    model.save_pretrained(tmp_path)
    found, expected = (each(**inputs("llama")).logits for each in (load_sparse(build("llama"), tmp_path), model))
    assert torch.equal(found, expected)


def test_files_in_subfolders_and_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    model.save_pretrained(tmp_path / "best")
    save_sparse(bare := sparse("llama", **FFN), tmp_path / "bare")
    again = load_sparse(build("llama"), tmp_path, subfolder="best")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    again = load_sparse(build("llama"), tmp_path, subfolder="bare")
    assert torch.equal(logits(again, "llama"), logits(bare, "llama"))

    asked = []

    def load(name: str, **where: object) -> dict:
        asked.append(where)
        return load_file(tmp_path / "best" / "adapter_model.safetensors")

    monkeypatch.setattr("sparsepeft.spt.loading.load_peft_weights", load)
    where = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path)}
    load_sparse(build("llama"), tmp_path / "best", adapter_name="other", is_trainable=True, **where)
    assert asked == [{"device": "cpu", **where}]


@pytest.mark.parametrize("values", ["routed", "exact"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt", {"target_modules": ["fc1"], "alpha_pattern": {"layers.0.fc1": 64}}),
        ("opt", {"target_modules": ["fc1"], "rank_pattern": {r"layers\.\d.fc1": 2}}),
        ("opt", {"target_modules": ["q_proj", "model.decoder.layers.0.fc1"]}),
        ("opt", {"target_modules": r".*(q_proj|layers\.1\.fc2)"}),
        ("opt", {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["0.fc1"]}),
        ("opt", {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.fc1"]}),
        ("bert", {"target_modules": ["query", "0.intermediate.dense"]}),
    ],
)
def test_names_that_fit_the_dense_model_alone_are_refused(name: str, options: dict, values: str) -> None:
    """They would be passed over, and be another adapter on the dense model."""
    model = get_peft_model(sparse(name, values=values, **FFN), LoraConfig(**options))
    *_, option = options
    with pytest.raises(ValueError, match=rf"^{option} fits .*, but the sparse model calls that .*; pass the end of"):
        logits(model, name)
    bare = model.unload()
    logits(bare, name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["up_proj"], "alpha_pattern": {"layers.0.mlp.up_proj": 64}}),
        ("opt", {"target_modules": "all-linear", "alpha_pattern": {r"layers\.0\.(activation_fn\.)?fc1": 64}}),
        ("opt", {"target_modules": ["0.activation_fn.fc1", "fc2"], "rank_pattern": {"activation_fn.fc1": 2}}),
        ("opt", {"target_modules": r".*\.activation_fn\.fc1"}),
        ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("bert", {"target_modules": ["dense"], "rank_pattern": {"intermediate.dense": 3, "output.dense": 2}}),
    ],
)
def test_an_adapter_extends_the_same_in_the_dense_model(name: str, options: dict, tmp_path: Path) -> None:
    config = LoraConfig(**options, init_lora_weights=False)
    model = get_peft_model(sparse(name, values="exact", **FFN), config).eval()
    expected = logits(model, name)
    model.save_pretrained(tmp_path / "sparse")
    for again in (
        PeftModel.from_pretrained(build(name), tmp_path / "sparse"),
        load_sparse(build(name), tmp_path / "sparse"),
    ):
        torch.testing.assert_close(logits(again.eval(), name), expected)
    load_sparse(build(name), tmp_path / "sparse").save_pretrained(tmp_path / "again")
    desparsify(model).save_pretrained(tmp_path / "dense")
    for folder in ("again", "dense"):
        again = PeftModel.from_pretrained(build(name), tmp_path / folder).eval()
        torch.testing.assert_close(logits(again, name), expected)


def test_this_packages_methods_refuse_a_dense_model_in_a_sentence(tmp_path: Path) -> None:
    model = get_peft_model(sparse("llama", "left", **ATTENTION), SpartanConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"trained on a sparse model.*sparsepeft\.load_sparse"):
        PeftModel.from_pretrained(build("llama"), tmp_path)
    assert "load_sparse(backbone" in (tmp_path / "README.md").read_text()
    assert torch.equal(logits(load_sparse(build("llama"), tmp_path), "llama"), logits(model.eval(), "llama"))
