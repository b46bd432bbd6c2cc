"""Models made sparse and dense again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.spt.models import (
    ALL,
    DECODERS,
    ENCODERS,
    EXPERTS,
    FEED_FORWARD_ONLY,
    SIZES,
    TARGETS,
    T,
    build,
    inputs,
    logits,
    plain_name,
    sparse,
)

from sparsepeft.spt.attention import NAME
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import desparsify, sparsification
from sparsepeft.spt.loading import load_sparse, save_sparse
from sparsepeft.spt.sparsifying import sparsify

BART = {"d_model": 32, "vocab_size": 99, "pad_token_id": 0} | {
    f"{stack}_{what}": value
    for stack in ("encoder", "decoder")
    for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
CONFIG = SptConfig(num_blocks=4, num_active_blocks=2)
DENSE = {"top_l": T, "num_blocks": 4, "num_active_blocks": 4}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the same sums in another order, through two layers with large weights


@pytest.mark.parametrize(
    ("name", "assignment", "padding"),
    [(name, "clustered", "left") for name in ALL]
    + [("mistral", "contiguous", "right"), ("bert", "contiguous", "right"), ("t5", "contiguous", None)],
)
def test_everything_kept_is_the_dense_model(name: str, assignment: str, padding: str | None) -> None:
    model = sparse(name, **DENSE, block_assignment=assignment).double()
    expected = logits(build(name).double(), name, padding=padding)
    torch.testing.assert_close(logits(model, name, padding=padding), expected)


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("name", ["mistral", "opt", "bert"])
def test_sparse_answers_differ_and_padding_is_never_seen(name: str, granularity: str) -> None:
    padding = "right" if name in ENCODERS else "left"  # encoders answer at the first position
    model = sparse(name, top_l=4, granularity=granularity, block_size=4)
    found = logits(model, name, padding=padding)
    assert not torch.allclose(found, logits(build(name), name, padding=padding), **CLOSE)
    given = inputs(name, padding)
    given["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], 7)
    with torch.no_grad():
        other = model(**given).logits
    other = other * given["attention_mask"][..., None] if other.dim() == 3 else other
    torch.testing.assert_close(other, found)


@pytest.mark.parametrize("similarity", ["inner_product", "matches"])
@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
@torch.no_grad()
def test_a_text_answers_the_same_alone_and_in_a_padded_batch(name: str, granularity: str, similarity: str) -> None:
    settings = {"ffn": False, "granularity": granularity, "similarity": similarity, "top_l": 8, "block_size": 4}
    model = sparse(name, **settings)
    given = inputs(name, "left")  # 5 of 24
    alone = {"input_ids": given["input_ids"][1:2, 5:]}
    if name == "bert":  # no decoder, so positions are counted by hand
        positions = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
        found = model.bert(**given, position_ids=positions).last_hidden_state[1:2, 5:]
        torch.testing.assert_close(found, model.bert(**alone).last_hidden_state, **CLOSE)
        return
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(model(**given).logits[1:2, 5:], model(**alone).logits, **CLOSE)
    del given["position_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for cached in (True, False):
        added = model.generate(**given, **options, use_cache=cached)[1, T:]
        assert torch.equal(added, model.generate(**alone, **options, use_cache=cached)[0, T - 5 :])


@pytest.mark.parametrize("name", ALL)
def test_dense_again_bit_for_bit(name: str) -> None:
    model = sparse(name, compensation_rank=2)
    state = build(name).state_dict()
    assert desparsify(model) is model
    assert sparsification(model) is None
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert torch.equal(logits(model, name), logits(build(name), name))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_only_some_layers(name: str) -> None:
    model = sparse(name, layers_to_transform=(1,))
    done = sparsification(model)
    assert len(done.attention) == (name not in FEED_FORWARD_ONLY)
    assert len(done.feed_forwards) == (2 if name in FEED_FORWARD_ONLY else 1)
    logits(model, name)


OVERRIDES = {
    "llama": {
        "model.layers.0.self_attn": {"dense": True},
        "model.layers.1.self_attn": {"top_l": 0.5},
        "model.layers.1.mlp": {"dense": True},
    },
    "bert": {"bert.encoder.layer.0": {"num_active_blocks": 1}, "bert.encoder.layer.1.attention.self": {"dense": True}},
    "opt": {"model.decoder.layers.1": {"dense": True}, "model.decoder.layers.1.self_attn": {"granularity": "block"}},
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_single_modules_with_settings_of_their_own(name: str, tmp_path: Path) -> None:
    overrides = OVERRIDES[name]
    model = sparse(name, overrides=overrides)
    done = sparsification(model)
    layers = dict(done.attention) | {each.name: layer for each, layer in done.feed_forwards}
    assert len(layers) == 4 - sum("dense" in own for own in overrides.values())
    for module, layer in layers.items():
        assert layer.config == done.config.of(module)
    save_sparse(model, tmp_path)
    again = load_sparse(build(name), tmp_path)
    assert sparsification(again).config == done.config
    assert torch.equal(logits(again, name), logits(model, name))
    assert torch.equal(logits(desparsify(model), name), logits(build(name), name))


def test_all_modules_left_dense() -> None:
    model = build("llama")
    names = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    before = model.config._attn_implementation
    sparsify(model, SptConfig(overrides={key: {"dense": True} for key in names}), inputs("llama")["input_ids"])
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


def put_in_order(model: Any) -> None:
    """Give LoRA weights, copied from a dense model, the order of the neurons in the blocks."""
    for _, routed in sparsification(model).feed_forwards:
        for name, module in routed.named_modules():
            if isinstance(module, LoraLayer):
                is_down = name == routed._names.down
                weight = (module.lora_A if is_down else module.lora_B)["default"].weight
                weight.data = weight.data.index_select(int(is_down), routed.spt_router.current.neuron_order)


@pytest.mark.parametrize("name", TARGETS)
def test_lora_inside_equals_lora_in_the_dense_model(name: str) -> None:
    lora = LoraConfig(target_modules=TARGETS[name], r=3, init_lora_weights=False)
    dense = get_peft_model(build(name), lora).eval().double()
    model = get_peft_model(sparse(name, **DENSE), lora).eval().double()
    updates = {key: tensor for key, tensor in dense.state_dict().items() if "lora_" in key}
    found = {plain_name(key): tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert found.keys() == updates.keys()
    for key, tensor in found.items():
        tensor.copy_(updates[key])
    put_in_order(model)
    torch.testing.assert_close(logits(model, name), logits(dense, name))
    merged = desparsify(model.merge_and_unload())
    torch.testing.assert_close(logits(merged, name), logits(dense, name))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_reach_lora_and_router(name: str) -> None:
    model = get_peft_model(sparse(name, top_l=6), LoraConfig(target_modules=TARGETS[name], r=3)).train()
    given = inputs(name)
    labels = given["input_ids"] if name in DECODERS else torch.tensor([0, 1, 0])
    model(**given, labels=labels).loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in key:  # whose partner starts from zero
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len([key for key in trained if "spt_router.modules_to_save" in key]) == 4  # weight and bias of two layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma4"])
def test_generation_with_a_cache_is_generation_without(name: str, cache: str) -> None:
    model = sparse(name, top_l=4)
    given = inputs(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, **options, use_cache=False)
    kept = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**given, **options, **kept), expected)


def test_lists_of_token_ids_are_a_batch() -> None:
    ids = inputs("llama")["input_ids"]
    one, mask = ids[:1], torch.ones_like(ids[0])
    for given, rows in (
        (ids.tolist(), ids),
        (ids[0].tolist(), one),
        (ids[0], one),
        ({"input_ids": ids[0].tolist(), "attention_mask": mask}, one),
        ({"input_ids": ids.numpy()}, ids),
    ):
        found, expected = (sparsify(build("llama"), CONFIG, data) for data in (given, rows))
        assert sparsification(found).report == sparsification(expected).report


def test_refused_before_anything_is_changed() -> None:
    ids = inputs("llama")["input_ids"]
    deberta = hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SIZES))
    mpnet = hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES))
    mobile = hf.MobileBertModel(
        hf.MobileBertConfig(**SIZES, embedding_size=16, intra_bottleneck_size=32, num_feedforward_networks=3)
    )
    cases: list[tuple[Any, dict[str, Any], Any, str]] = [
        (build("llama"), {}, None, "calibration_data"),
        (build("llama"), {}, ids[:0], "empty"),
        (build("llama"), {}, ["a text", "another"], "holds texts, .* pass tokenizer"),
        (build("llama"), {}, [[1, 2], [3]], "sequences of 1 to 2 token ids; pad or cut"),
        (build("llama"), {}, [None], "expected token ids"),
        (build("llama"), {}, [[1, 2], 3], "expected token ids"),
        *((build("llama"), {}, data, "expected token ids .* or the mapping") for data in (5, iter([ids]))),
        *((build("llama"), {}, data, "expected whole numbers") for data in (ids.float(), ids > 3, ids[None])),
        (build("llama"), {}, ids + 99, r"token id 1\d\d, but LlamaForCausalLM knows 0 to 98"),
        (build("llama"), {}, -ids, r"token id -\d+, but"),
        (build("llama"), {}, {"input_ids": ids, "attention_mask": 0 * ids}, "0 everywhere in attention_mask"),
        (build("roberta"), {}, ids.repeat(1, 4), "RobertaForSequenceClassification cannot be run on calibration_data"),
        (build("llama"), {}, {"inputs_embeds": torch.full((1, 4, 32), torch.nan)}, "NaN"),
        (build("llama"), {"subvector_dim": 3}, ids, "does not divide"),
        (
            build("llama"),
            {"num_blocks": 5, "num_active_blocks": 1},
            ids,
            "num_blocks=5 does not divide; choose one of 1, 2",
        ),
        (
            build("llama"),
            {"overrides": {"model.layers.0": {"dense": True}}},
            ids,
            r"'model.layers.0', but .*0.self_attn",
        ),
        (
            build("llama"),
            {"overrides": {"model.layers.0.mlp": {"top_l": 4}}},
            ids,
            r"overrides of model.layers.0.mlp has 'top_l', but model.layers.0.mlp is an FFN",
        ),
        (build("llama"), {"layers_to_transform": (7,)}, ids, "7"),
        (build("llama"), {"layers_to_transform": (-1,), "ffn": False}, ids, "numbered 0 to 1"),
        (mobile, {"attention": False}, ids, "has 3 FFNs, of which only one would become sparse"),
        *((build(name), {"attention": False}, ids, "is a mixture of experts .*, of which a token") for name in EXPERTS),
        (build("t5"), {}, inputs("t5"), "position_bias"),
        (deberta, {}, ids, "DebertaV2ForSequenceClassification does not attend through .* attention interface"),
        (mpnet, {}, ids, "MPNetForSequenceClassification does not attend through .* attention interface"),
    ]
    for model, values, data, words in cases:
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            sparsify(model, SptConfig(**{"num_blocks": 4, "num_active_blocks": 2} | values), calibration_data=data)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert sparsification(model) is None
    with pytest.raises(TypeError, match="before get_peft_model"):
        sparsify(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])), SptConfig(), ids)
    with pytest.raises(TypeError, match="got a dict as its config; expected an SptConfig"):
        sparsify(build("llama"), {"top_l": 3}, ids)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(sparse("llama"), SptConfig(), ids)
    with pytest.raises(ValueError, match="not sparse"):
        desparsify(build("llama"))


def test_the_layers_of_a_mixture_of_experts_that_have_none() -> None:
    model = sparse("deepseek-v3", layers_to_transform=0)
    done = sparsification(model)
    assert [each.name for each, _ in done.feed_forwards] == ["model.layers.0.mlp"]
    assert list(done.attention) == ["model.layers.0.self_attn"]
    logits(model, "llama")


def test_layers_are_counted_in_each_stack() -> None:
    model = hf.BartModel(hf.BartConfig(**BART))
    done = sparsification(sparsify(model, SptConfig(top_l=4, layers_to_transform=1), inputs("llama")["input_ids"]))
    assert list(done.attention) == [f"{stack}.layers.1.self_attn" for stack in ("encoder", "decoder")]
    assert [each.name for each, _ in done.feed_forwards] == ["encoder.layers.1", "decoder.layers.1"]


def llava() -> Any:
    """A text model with a tower for images of 16 tokens."""
    tower = hf.CLIPVisionConfig(**{**SIZES, "vocab_size": 0}, image_size=32, patch_size=8)
    text = hf.LlamaConfig(**SIZES, num_key_value_heads=2)
    torch.manual_seed(0)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=5, image_seq_length=16)
    ).eval()


@pytest.mark.parametrize("calibrated_with", ["text", "images"])
@torch.no_grad()
def test_towers_stay_as_they_are(calibrated_with: str) -> None:
    model = llava()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa", "": "sdpa"})
    ids = inputs("llama")["input_ids"].clamp_min(6)
    with_images = ids.clone()
    with_images[:, 2:18] = 5
    images = {"input_ids": with_images, "pixel_values": torch.randn(3, 3, 32, 32)}
    expected = model(**images).logits
    config = SptConfig(ffn=False, top_l=T)
    done = sparsification(sparsify(model, config, ids if calibrated_with == "text" else images))
    assert list(done.attention) == [f"model.language_model.layers.{i}.self_attn" for i in range(2)]
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == NAME
    torch.testing.assert_close(model(**images).logits, expected, **CLOSE)
    desparsify(model)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**images).logits, expected)


@torch.no_grad()
def test_an_encoder_without_a_mask_stays_dense() -> None:
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**BART | tokens, num_mel_bins=8, max_source_positions=20)
    model = hf.WhisperForConditionalGeneration(config).eval()
    given = {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": inputs("llama")["input_ids"]}
    expected = model(**given).logits
    done = sparsification(sparsify(model, SptConfig(ffn=False, top_l=T), given))
    assert list(done.attention) == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]
    torch.testing.assert_close(model(**given).logits, expected, **CLOSE)


def test_a_fraction_is_of_the_longest_keys() -> None:
    ids = inputs("llama")["input_ids"]
    bart = sparsify(hf.BartModel(hf.BartConfig(**BART)), CONFIG, {"decoder_input_ids": ids[:, :8], "input_ids": ids})
    assert sparsification(bart).config.top_l == T // 8
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    vit = hf.ViTModel(hf.ViTConfig(**sizes, image_size=32, patch_size=4))
    sparsify(vit, SptConfig(ffn=False), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert sparsification(vit).config.top_l == 8  # of 64 patches and one more


@pytest.mark.parametrize("values", ["exact", "routed"])
def test_each_module_keeps_its_mode(values: str) -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    sparsify(model, SptConfig(top_l=5, values=values, num_blocks=4), inputs("llama")["input_ids"])
    after = {name: module.training for name, module in model.named_modules() if name in before}
    assert after == {name: before[name] for name in after}
    desparsify(model)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_padded_batch_whose_mask_got_lost_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second registration transformers would hand on no mask, and padding would be attended."""
    model = sparse(name)
    given = inputs(name, padding="right")
    model(**given)
    monkeypatch.delitem(hf.AttentionMaskInterface._global_mapping, NAME)
    with pytest.raises(ValueError, match="Sparse attention received"):
        model(**given)


def test_a_model_with_nans_is_named() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn are NaN"):
        sparsify(model, SptConfig(ffn=False), inputs("llama")["input_ids"])
