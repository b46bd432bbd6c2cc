"""What is written, and what happens to a file that does not fit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from tests.models import ARCHITECTURES, METHODS, SMALL, D, adapted, add, build, randomize, run, save_backbone

from sparsepeft import HeadConfig, SpartanConfig
from sparsepeft.models import identity
from sparsepeft.models.quantized import dequantize, quantize

TASK_METHODS = METHODS | {"head": HeadConfig}
INPUTS = ARCHITECTURES["bert"].inputs()
FILE = "adapter_model.safetensors"


def _with_new_tokens(folder: str) -> torch.nn.Module:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 6)
    return model.eval()


@pytest.mark.parametrize(("method", "tied"), [("spartan", True), ("houlsby", False)])
def test_embeddings_of_added_tokens_come_with_the_adapter(tmp_path, method: str, tied: bool) -> None:
    config = build("llama").config
    config.tie_word_embeddings = tied
    folder = save_backbone(hf.LlamaForCausalLM(config), tmp_path / "backbone")
    model = adapted(_with_new_tokens(folder), config=METHODS[method]())
    assert not any("embed" in n or "lm_head" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "task")
    inputs = {"input_ids": torch.arange(90, 105).reshape(1, -1)}
    loaded = PeftModel.from_pretrained(_with_new_tokens(folder), tmp_path / "task")
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"model.embed_tokens\.weight' \[105, 32\].*resize_token_embeddings\(105\)"):
        PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "task")
    # An adapter from before tokens were added goes on a model with more of them, as others do.
    adapted(hf.AutoModelForCausalLM.from_pretrained(folder), config=METHODS[method]()).save_pretrained(tmp_path / "old")
    PeftModel.from_pretrained(_with_new_tokens(folder), tmp_path / "old")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_resized_embeddings_that_modules_share_are_no_part_of_what_identifies_a_backbone(
    tmp_path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_NUM_TENSORS", 1000)  # all of them
    folder = save_backbone(name, tmp_path / "backbone")

    def resized() -> torch.nn.Module:
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(folder)
        model.resize_token_embeddings(model.config.vocab_size + 6)
        return model.eval()

    model = adapted(resized())
    model.save_pretrained(tmp_path / "task")
    inputs = ARCHITECTURES[name].inputs()
    loaded = PeftModel.from_pretrained(resized(), tmp_path / "task")
    torch.testing.assert_close(run(loaded, inputs), run(model, inputs), rtol=0, atol=0)
    other = resized()
    for parameter in other.get_encoder().parameters():
        parameter.data.mul_(1.1)
    with pytest.raises(ValueError, match="has other values"):
        PeftModel.from_pretrained(other, tmp_path / "task")


@pytest.mark.parametrize("method", TASK_METHODS)
def test_embeddings_can_be_saved_with_any_adapter(tmp_path, method: str) -> None:
    model = adapted("bert", config=TASK_METHODS[method]())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    backbone = build("bert")
    expected = backbone.get_input_embeddings().weight.clone()
    backbone.get_input_embeddings().weight.data[5:].zero_()
    config = type(model.peft_config["default"]).from_pretrained(tmp_path)
    config.check_backbone = False
    loaded = PeftModel.from_pretrained(backbone, tmp_path, config=config)
    assert torch.equal(loaded.get_input_embeddings().weight, expected)


@pytest.mark.filterwarnings("ignore:save_dtype='int8'")
@pytest.mark.parametrize("save_dtype", [None, "int8"])
@pytest.mark.parametrize("method", TASK_METHODS)
def test_state_dicts_of_an_adapter_injected_into_a_model(method: str, save_dtype: str | None) -> None:
    model = inject_adapter_in_model(TASK_METHODS[method](save_dtype=save_dtype), build("bert"))
    randomize(model)
    fresh = inject_adapter_in_model(TASK_METHODS[method](), build("bert"))
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    torch.testing.assert_close(run(fresh.eval(), INPUTS), run(model.eval(), INPUTS), rtol=0.05, atol=0.02)
    if save_dtype is None:
        assert torch.equal(run(fresh, INPUTS), run(model, INPUTS))


def test_tensors_of_another_shape_are_left_out_if_asked() -> None:
    state = get_peft_model_state_dict(adapted("bert", num_labels=5))
    model = adapted("bert", num_labels=3, random=False)
    head = model.base_model.model.classifier.modules_to_save["default"].weight.clone()
    with pytest.raises(
        ValueError, match=r"of another shape: classifier.bias \[5\] instead of \[3\], classifier.weight"
    ):
        set_peft_model_state_dict(model, state)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, head)
    memory = "bert.encoder.layer.0.spartan_memory.default.parent_keys"
    assert torch.equal(
        model.base_model.model.get_parameter(memory), adapted("bert").base_model.model.get_parameter(memory)
    )
    del state["base_model.model.classifier.bias"]
    with pytest.raises(ValueError, match=r"missing: classifier.bias; of another shape: classifier.weight"):
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)


def test_only_memory_head_and_norms_are_saved_as_safetensors(tmp_path) -> None:
    adapted("roberta", num_labels=3).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "adapter_config.json", "README.md"}
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / FILE)}
    parts = ("child_keys", "child_values", "parent_keys")
    memory = {f"roberta.encoder.layer.{layer}.spartan_memory.{part}" for layer in range(3) for part in parts}
    head = {f"classifier.{name}" for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")}
    assert names == memory | head
    adapted("bert", train_layer_norms=True).save_pretrained(tmp_path / "norms")
    assert sum("LayerNorm" in name for name in load_file(tmp_path / "norms" / FILE)) == 2 * (2 * 3 + 1)


def test_each_adapter_has_a_folder_of_its_own_that_loads_under_any_name(tmp_path) -> None:
    model = adapted("bert", "one")
    add(model, "two", num_labels=4)
    model.save_pretrained(tmp_path)
    model.set_adapter("two")
    loaded = adapted("bert", "one")
    loaded.load_adapter(str(tmp_path / "two"), "renamed")
    loaded.set_adapter("renamed")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("options", [{}, {"head_type": "linear", "num_labels": 3}, {"train_layer_norms": True}])
def test_loading_without_a_second_copy_in_memory(tmp_path, low_cpu_mem_usage: bool, options: dict) -> None:
    model = adapted("bert", **options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    loaded.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))


def test_low_cpu_mem_usage_keeps_what_was_there() -> None:
    model = adapted("bert", "one")
    model.add_adapter("two", SpartanConfig(num_parents=4, top_k=2), low_cpu_mem_usage=True)
    memory = [p for n, p in model.named_parameters() if "spartan_memory.two" in n]
    assert memory
    assert all(p.device.type == "meta" for p in memory)
    assert not any(p.device.type == "meta" for n, p in model.named_parameters() if "spartan_memory.one" in n)


@pytest.mark.parametrize(
    ("name", "source", "options", "auto"),
    [
        (
            "bert",
            hf.AutoModelForSequenceClassification,
            {"num_labels": 5, "task_type": "SEQ_CLS"},
            AutoPeftModelForSequenceClassification,
        ),
        ("gpt2", hf.AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}, AutoPeftModelForCausalLM),
        ("bert", hf.BertForSequenceClassification, {}, AutoPeftModel),
    ],
)
def test_auto_classes_find_backbone_and_class(tmp_path, name: str, source, options: dict, auto) -> None:
    backbone = save_backbone(name, tmp_path / "backbone")
    model = adapted(source.from_pretrained(backbone), **options)
    model.save_pretrained(tmp_path / "task")
    assert torch.equal(run(auto.from_pretrained(tmp_path / "task"), INPUTS), run(model, INPUTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_save_dtype_halves_the_file_and_nearly_keeps_the_answers(tmp_path, dtype: str) -> None:
    model = adapted("roberta", train_layer_norms=True)
    model.save_pretrained(tmp_path / "full")
    model.peft_config["default"].save_dtype = dtype
    model.save_pretrained(tmp_path / "half")
    full, half = load_file(tmp_path / "full" / FILE), load_file(tmp_path / "half" / FILE)
    assert full.keys() == half.keys()
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in half.values())
    assert sum(t.nbytes for t in half.values()) * 2 == sum(t.nbytes for t in full.values())
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build("roberta"), tmp_path / "half", low_cpu_mem_usage=low_cpu_mem_usage)
        assert all(p.dtype == torch.float32 for p in loaded.parameters())
        # bf16 keeps 8 bits: weights move by up to 0.4 %
        torch.testing.assert_close(run(loaded, INPUTS), run(model, INPUTS), rtol=0.05, atol=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("config", ["spartan", "pfeiffer", "bitfit"])
def test_int8_stores_rows_with_a_scale_each_and_nearly_keeps_the_answers(tmp_path, config, low_cpu_mem_usage) -> None:
    options = {"train_layer_norms": True} if config == "spartan" else {}
    model = adapted("roberta", config=METHODS[config](num_labels=3, **options))
    model.save_pretrained(tmp_path / "full")
    model.peft_config["default"].save_dtype = "int8"
    model.save_pretrained(tmp_path / "int8")
    full, stored = load_file(tmp_path / "full" / FILE), load_file(tmp_path / "int8" / FILE)
    rows = {name for name, tensor in full.items() if tensor.dim() > 1}
    assert stored.keys() == full.keys() | {f"{name}_scale" for name in rows}
    for name, tensor in full.items():
        if name not in rows:
            assert torch.equal(stored[name], tensor)
            continue
        assert stored[name].dtype == torch.int8
        scale = stored[f"{name}_scale"]
        torch.testing.assert_close(scale, tensor.abs().amax(-1, keepdim=True) / 127)
        assert ((stored[name] * scale - tensor).abs() <= scale * 0.501).all()  # half a step, and rounding
    loaded = PeftModel.from_pretrained(build("roberta"), tmp_path / "int8", low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    # 8 bits per row: weights move by up to 0.4 % of their row's largest
    torch.testing.assert_close(run(loaded, INPUTS), run(model, INPUTS), rtol=0.05, atol=0.02)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / FILE)
    assert all(torch.equal(again[name], stored[name]) for name in rows)


@pytest.mark.parametrize(
    ("save_dtype", "value", "kept"),
    [
        ("int8", float("nan"), False),
        ("int8", -float("inf"), False),
        ("float16", 1e5, False),
        ("float16", float("nan"), True),
        ("bfloat16", 3.4e38, False),
        ("bfloat16", float("inf"), True),
        (None, float("nan"), True),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused_and_never_made_finite(tmp_path, save_dtype, value, kept) -> None:
    place = "classifier" if save_dtype == "bfloat16" else "child_values"
    model = adapted("bert", save_dtype=save_dtype)
    tensor = next(p for n, p in model.named_parameters() if place in n and ".default." in n)
    tensor.data.view(-1)[3] = value
    if kept:
        model.save_pretrained(tmp_path)
    else:
        with pytest.raises(ValueError, match=rf"tensor .*{place}.*save_dtype='{save_dtype}'"):
            model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    if place == "child_values":  # what was written is whole, in full precision where it was refused
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
        found = next(p for n, p in loaded.named_parameters() if n.endswith(f"{place}.default") or place in n)
        assert torch.equal(found.isfinite(), tensor.isfinite())


@pytest.mark.parametrize("size", [1e-38, 1e-43, 190 * 2.0**-149, 2.0**-149])
def test_int8_of_tiny_numbers_stays_near_them_and_zeros_stay_zeros(size: float) -> None:
    rows = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]) * size
    restored = dequantize(quantize({"rows": rows}))["rows"]
    assert not restored[1].any()
    assert ((restored - rows).abs() <= max(size / 2, 2.0**-149)).all()


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_pickled_files_have_the_dtype_as_well_and_states_in_memory_do_not(tmp_path, safe_serialization: bool) -> None:
    model = adapted("bert", save_dtype="bfloat16", num_labels=3)
    state = get_peft_model_state_dict(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    saved = load_peft_weights(str(tmp_path), device="cpu")
    assert saved.keys() == state.keys()
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in saved.items())


def test_int8_is_refused_by_transformers_own_loading(tmp_path) -> None:
    backbone = save_backbone("bert", tmp_path / "backbone")
    model = adapted(hf.AutoModelForSequenceClassification.from_pretrained(backbone), save_dtype="int8")
    model.save_pretrained(tmp_path / "task")
    bare = hf.AutoModelForSequenceClassification.from_pretrained(backbone)
    with pytest.raises(ValueError, match=r"int8 weights.*PeftModel\.from_pretrained"):
        bare.load_adapter(str(tmp_path / "task"))


@pytest.mark.parametrize(
    ("given", "saved"), [("int8", torch.float32), ("bfloat16", torch.bfloat16), (None, torch.float32)]
)
def test_what_transformers_saves_it_can_load_also_from_a_checkpoint(tmp_path, given: str | None, saved) -> None:
    model, config = build("bert"), SpartanConfig(**SMALL, save_dtype=given)
    with pytest.warns(UserWarning, match="int8.*saved as they are") if given == "int8" else nullcontext():
        model.add_adapter(config)
    assert config.save_dtype == given  # the caller's own object
    randomize(model)
    model.save_pretrained(tmp_path / "checkpoint-5")
    assert {tensor.dtype for tensor in load_file(tmp_path / "checkpoint-5" / FILE).values()} == {saved}
    loaded = build("bert")
    loaded.load_adapter(str(tmp_path / "checkpoint-5"))
    exact = {"rtol": 0, "atol": 0} if saved == torch.float32 else {"rtol": 0.05, "atol": 0.02}  # 8 bits of bfloat16
    torch.testing.assert_close(run(loaded, INPUTS), run(model, INPUTS), **exact)


PREFIX = "base_model.model."
LAYER = f"{PREFIX}bert.encoder.layer"


def _break(folder, change: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a saved adapter, all whose names contain the key; None takes them out."""
    tensors = load_file(folder / FILE)
    for key, value in change.items():
        for name in [name for name in tensors if key in name] or [key]:
            tensors.pop(name, None)
            if value is not None:
                tensors[name] = value
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("scales", [None, torch.ones(1)])
def test_int8_without_its_scales_is_refused(tmp_path, scales: torch.Tensor | None) -> None:
    adapted("bert", save_dtype="int8").save_pretrained(tmp_path)
    _break(tmp_path, {f"{LAYER}.2.spartan_memory.parent_keys_scale": scales})
    with pytest.raises(ValueError, match=r"parent_keys' is int8 .*scales .*damaged"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


ADDED = {f"{LAYER}.7.spartan_memory.parent_keys": torch.zeros(6, D)}
RESIZED = {f"{PREFIX}classifier.weight": torch.zeros(4, D)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"classifier": None}, ["missing: classifier.bias, classifier.weight"]),
        ({f"{LAYER}.2.spartan_memory.parent_keys": None}, ["missing: bert.encoder.layer.2.spartan_memory.parent_keys"]),
        (ADDED, ["unexpected: bert.encoder.layer.7.spartan_memory.parent_keys"]),
        ({f"{LAYER}.0.output.LayerNorm.weight": torch.ones(D)}, ["unexpected: bert.encoder.layer.0.output.LayerNorm"]),
        (RESIZED, ["of another shape: classifier.weight [4, 32] instead of [2, 32]"]),
        ({f"{LAYER}.0.spartan_memory.parent_keys": torch.zeros(8, D)}, ["parent_keys [8, 32] instead of [6, 32]"]),
        (
            {"layer.1.": None, "classifier.bias": None} | ADDED | RESIZED,
            ["missing: ", "unexpected: ", "another shape: "],
        ),
        ({PREFIX: None}, ["missing: ", "and 7 more"]),
    ],
)
def test_a_file_that_does_not_fit_is_one_error_with_all_names(tmp_path, change, parts: list[str]) -> None:
    model = adapted("bert")
    model.save_pretrained(tmp_path)
    _break(tmp_path, change)
    for attach in (
        lambda: PeftModel.from_pretrained(build("bert"), tmp_path),
        lambda: model.load_adapter(str(tmp_path), "task"),
        lambda: adapted("bert").load_adapter(str(tmp_path), "default"),
    ):
        with pytest.raises(ValueError, match="do not fit the adapter") as error:
            attach()
        for part in parts:
            assert part in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_card_counts_what_the_method_adds(method: str, tmp_path) -> None:
    model = adapted("bert", config=METHODS[method]())
    model.save_pretrained(tmp_path)
    part = "memory" if method == "spartan" else "adapter"
    formula, _ = model.base_model.parameter_formula()
    assert f"\nParameters of the {part}: {formula}\n" in (tmp_path / "README.md").read_text()


def test_the_card_says_how_to_load_it_and_the_code_in_it_runs(tmp_path) -> None:
    backbone = save_backbone("bert", tmp_path / "backbone")
    model = adapted(
        hf.AutoModelForSequenceClassification.from_pretrained(backbone),
        task_type="SEQ_CLS",
        id2label={0: "sad", 1: "glad", 2: "so so"},
    )
    folder = tmp_path / "task"
    model.save_pretrained(folder)
    model.save_pretrained(folder)  # renewed, not repeated
    card = (folder / "README.md").read_text()
    assert card.count("## How to load") == 1
    assert card.count("import sparsepeft") == 1
    assert "sad, glad, so so" in card
    assert f"{model.base_model.parameter_formula()[1]:,}" in card
    assert str(tmp_path) not in card
    (folder / "README.md").write_text(f"{card}\nMy own notes.\n")
    model.save_pretrained(folder)
    assert "My own notes." in (folder / "README.md").read_text()
    code = card.partition("```python")[2].partition("```")[0].replace("path/to/backbone", str(backbone))
    namespace: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), namespace)
    assert torch.equal(run(namespace["model"].eval(), INPUTS), run(model, INPUTS))


def test_peft_functions_see_backbone_and_adapter_apart() -> None:
    from peft.utils.save_and_load import get_base_model_state_dict

    model = adapted("bert", train_layer_norms=True, num_labels=3)
    bare = build("bert").state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[name], bare[name]) for name in bare)
    state = get_peft_model_state_dict(model)
    fresh = adapted("bert", train_layer_norms=True, num_labels=3, random=False)
    set_peft_model_state_dict(fresh, state)
    assert torch.equal(run(fresh, INPUTS), run(model, INPUTS))
