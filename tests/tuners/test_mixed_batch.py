"""One batch, several tasks: each row must get what its adapter gives alone."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import PeftModel
from tests.models import ARCHITECTURES, METHODS, adapted, add, answers, run

from sparsepeft.tuners.layer import TaskTunerLayer

INPUTS = ARCHITECTURES["bert"].inputs(batch=5)


@pytest.fixture
def model() -> PeftModel:
    model = adapted("bert", "two")
    add(model, "five", num_labels=5, num_parents=9, top_k=4)
    add(model, "small", num_labels=3, head_type="linear", layers_to_transform=[2])
    return model


ADAPTERS = ("two", "five", "small")


@pytest.mark.parametrize(
    "names",
    [
        ["two", "five", "small", "__base__", "five"],
        ["__base__"] * 5,
        ["small"] * 5,
        ["five", "five", "two", "two", "two"],
    ],
)
def test_rows_of_different_widths_are_padded_with_minus_infinity(model: PeftModel, names: list[str]) -> None:
    widths = {"two": 2, "five": 5, "small": 3, "__base__": 2}
    mixed, alone = run(model, INPUTS, adapter_names=names), answers(model, INPUTS, *ADAPTERS)
    assert mixed.shape == (5, max(widths[name] for name in names))
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row, : widths[name]], alone[name][row], rtol=1e-4, atol=1e-5)
        assert (mixed[row, widths[name] :] == float("-inf")).all()
    assert (mixed.softmax(-1).sum(-1) - 1).abs().max() < 1e-5


def test_a_mixed_batch_leaves_the_active_adapter_as_it_was_also_if_it_fails(model: PeftModel) -> None:
    model.set_adapter("five")
    expected = run(model, INPUTS)
    run(model, INPUTS, adapter_names=["two"] * 5)
    assert model.active_adapter == "five"
    assert torch.equal(run(model, INPUTS), expected)
    with pytest.raises(ValueError, match="one adapter name per input"):
        run(model, INPUTS, adapter_names=["two", "five"])
    assert torch.equal(run(model, INPUTS), expected)


def test_what_cannot_be_mixed_is_refused_in_words(model: PeftModel) -> None:
    with pytest.raises(ValueError, match=r"'nine'.*'__base__'"):
        run(model, INPUTS, adapter_names=["two", "nine", "two", "two", "two"])
    with pytest.raises(ValueError, match="leave labels out"):
        model(**INPUTS, adapter_names=["two"] * 5, labels=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(**INPUTS, adapter_names=["two"] * 5)


def test_regression_and_classification_in_one_batch(model: PeftModel) -> None:
    add(model, "degree", num_labels=1)
    names = ["degree", "five", "degree", "two", "two"]
    mixed = run(model, INPUTS, adapter_names=names)
    assert mixed.shape == (5, 5)
    alone = answers(model, INPUTS, "degree")["degree"]
    torch.testing.assert_close(mixed[[0, 2], :1], alone[[0, 2]], rtol=1e-4, atol=1e-5)


def test_hidden_states_of_a_mixed_batch_are_each_adapters_own(model: PeftModel) -> None:
    names = ["two", "five", "small", "__base__", "five"]
    with torch.no_grad():
        mixed = model(**INPUTS, adapter_names=names, output_hidden_states=True).hidden_states
        for name in set(names) - {"__base__"}:
            model.set_adapter(name)
            alone = model(**INPUTS, output_hidden_states=True).hidden_states
            rows = [row for row, given in enumerate(names) if given == name]
            for layer, states in enumerate(mixed):
                torch.testing.assert_close(states[rows], alone[layer][rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["spartan", "pfeiffer", "houlsby"])
def test_gemma_3n_has_several_versions_of_its_states(method: str) -> None:
    """Its layers hand on (4, B, T, D); with four inputs the first dimension fits, too."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Gemma3nTextConfig(
        **sizes,
        head_dim=8,
        intermediate_size=64,
        vocab_size=99,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    options = {"train_layer_norms": True} if method == "spartan" else {}
    model = adapted(hf.Gemma3nForCausalLM(config).eval(), "one", config=METHODS[method](**options))
    add(model, "two", config=METHODS[method](**options))
    for batch in (4, 3):
        inputs = ARCHITECTURES["llama"].inputs(batch=batch)
        names = ["one", "two", "__base__", "one"][:batch]
        mixed, alone = run(model, inputs, adapter_names=names), answers(model, inputs, "one", "two")
        assert not torch.allclose(alone["one"], alone["two"])
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def _translates() -> hf.FSMTForConditionalGeneration:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in SIDES.items()}
    config = hf.FSMTConfig(langs=["a", "b"], src_vocab_size=99, tgt_vocab_size=99, d_model=32, init_std=0.3, **sizes)
    torch.manual_seed(0)
    return hf.FSMTForConditionalGeneration(config).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [8, 7])
def test_layers_whose_batch_is_second(method: str, length: int) -> None:
    """FSMT's; with eight tokens the first dimension fits, too."""
    ids = torch.randint(3, 99, (4, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    model = adapted(_translates(), "one", config=METHODS[method]())
    add(model, "two", config=METHODS[method]())
    names = ["one", "two", "__base__", "one"]
    mixed, alone = run(model, inputs, adapter_names=names), answers(model, inputs, "one", "two")
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-2)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)


def test_images_of_bridgetower_have_their_batch_second() -> None:
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    model = adapted(hf.BridgeTowerModel(hf.BridgeTowerConfig(vision_config=vision)).vision_model.eval())
    assert {layer.batch_dim for layer in model.modules() if isinstance(layer, TaskTunerLayer)} == {1}


def test_biases_of_modules_that_turn_their_states_are_refused() -> None:
    """Longformer's attention has (T, B, D), and T is a multiple of its window, so that most numbers of inputs fit."""
    config = hf.LongformerConfig(**SIZES, attention_window=[4, 4], max_position_embeddings=64, pad_token_id=1)
    model = adapted(hf.LongformerForTokenClassification(config), "one", config=METHODS["bitfit"]())
    add(model, "two", config=METHODS["bitfit"]())
    inputs = ARCHITECTURES["bert"].inputs(batch=4)
    with pytest.raises(ValueError, match=r"query of Longformer.*another order.*batch of their own"):
        run(model, inputs, adapter_names=["one", "two", "two", "one"])
    model.set_adapter("two")
    expected = run(model, inputs)
    torch.testing.assert_close(run(model, inputs, adapter_names=["two"] * 4), expected)


def test_a_norm_of_relative_positions_is_refused() -> None:
    """DeBERTa-v3 normalises its relative positions, which have no rows, by the norm that an adapter trains."""
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = hf.DebertaV2Config(**SIZES, **positions, norm_rel_ebd="layer_norm", pooler_hidden_size=32)
    model = adapted(hf.DebertaV2ForSequenceClassification(config), "one", train_layer_norms=True)
    add(model, "two", train_layer_norms=True)
    with pytest.raises(ValueError, match=r"LayerNorm of the parameter \(16, 32\).*once for all rows"):
        run(model, ARCHITECTURES["deberta-v2"].inputs(batch=4), adapter_names=["one", "two", "two", "one"])
    expected = answers(model, ARCHITECTURES["deberta-v2"].inputs(), "two")["two"]
    torch.testing.assert_close(run(model, ARCHITECTURES["deberta-v2"].inputs(), adapter_names=["two"] * 3), expected)


def test_what_pefts_models_of_a_task_are_called_with_is_checked_too() -> None:
    inputs = {"input_ids": ARCHITECTURES["llama"].inputs(batch=3)["input_ids"]}
    for name, task_type in (("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")):
        model = adapted(name, "one", task_type=task_type)
        add(model, "two", task_type=task_type)
        labels = inputs["input_ids"] if name == "llama" else torch.tensor([1, 0, 1])
        with pytest.raises(ValueError, match="leave labels out"):
            model(**inputs, labels=labels, adapter_names=["one", "two", "two"])
        alone = answers(model, inputs, "one", "two")
        mixed = run(model, inputs, adapter_names=["one", "two", "two"])
        torch.testing.assert_close(mixed, torch.stack([alone["one"][0], *alone["two"][1:]]), rtol=1e-4, atol=1e-5)
        assert model(**inputs, labels=labels).loss is not None


def _sees() -> hf.Qwen2VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 64, "vocab_size": 99, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision | {"temporal_patch_size": 1}, **tokens)
    torch.manual_seed(0)
    return hf.Qwen2VLForConditionalGeneration(config).eval()


def _with_images(counts: list[int]) -> dict[str, torch.Tensor]:
    """Texts with ``counts`` images of 16 patches, four tokens, each; all images' patches are one long row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (len(counts), 14), generator=generator)
    for row, count in enumerate(counts):
        for image in range(count):
            ids[row, 6 * image + 1 : 6 * image + 7] = torch.tensor([92, 90, 90, 90, 90, 93])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 90).long(),
        "pixel_values": torch.randn(16 * sum(counts), 48, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(counts)),
    }


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_rows_of_a_tower_of_packed_images_are_known_where_all_inputs_have_as_many(task_type: str | None) -> None:
    model = adapted(_sees(), "one", task_type=task_type)
    add(model, "two", task_type=task_type)
    inputs = _with_images([1, 1])
    mixed, alone = run(model, inputs, adapter_names=["one", "two"]), answers(model, inputs, "one", "two")
    for row, name in enumerate(("one", "two")):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)
    uneven = _with_images([2, 0])  # 32 patches, which two names would share
    with pytest.raises(ValueError, match=r"same number of image .* one adapter each"):
        run(model, uneven, adapter_names=["one", "two"])
    expected = answers(model, uneven, "one")["one"]
    assert torch.equal(run(model, uneven, adapter_names=["one", "one"]), expected)


def test_adapters_of_the_texts_layers_do_not_mind_uneven_images() -> None:
    model = adapted(_sees(), "one", target_modules=r".*language_model\.layers\.\d+")
    add(model, "two", target_modules=r".*language_model\.layers\.\d+")
    inputs = _with_images([2, 0])
    mixed, alone = run(model, inputs, adapter_names=["one", "two"]), answers(model, inputs, "one", "two")
    for row, name in enumerate(("one", "two")):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)
    model = adapted(_sees(), "one", target_modules=r".*language_model\.layers\.\d+", train_layer_norms=True)
    add(model, "two", target_modules=r".*language_model\.layers\.\d+")
    with pytest.raises(ValueError, match="one adapter each"):  # the tower's norms are adapted, too
        run(model, inputs, adapter_names=["one", "two"])


def test_a_name_for_two_inputs_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="3 entries for a batch of 6; pass one adapter name per input"):
        run(model, ARCHITECTURES["bert"].inputs(batch=6), adapter_names=["two", "five", "small"])
