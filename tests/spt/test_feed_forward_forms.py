"""A sparse FFN computes what the dense one does: others are refused, and dropout falls where it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tests.spt.models import SIZES, build, inputs

from sparsepeft.models.modes import in_mode
from sparsepeft.models.sublayers import find_feed_forwards
from sparsepeft.spt import SptConfig, desparsify, sparsification, sparsify

LLAMA = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FALCON = LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
GEMMA_3N = LLAMA | {
    "head_dim": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    "laurel_rank": 8,
    "layer_types": ["full_attention"] * 2,
}
BART = {"d_model": 32, "vocab_size": 99, "pad_token_id": 0, "dropout": 0.0} | {
    f"{stack}_{what}": value
    for stack in ("encoder", "decoder")
    for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 20, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS: dict[str, Any] = {"attention": False, "num_blocks": 4, "num_active_blocks": 4}

OTHERS: dict[str, tuple[type, Any]] = {
    "a norm": (hf.BitNetForCausalLM, hf.BitNetConfig(**LLAMA)),
    "factors": (hf.FalconH1ForCausalLM, hf.FalconH1Config(**FALCON, mlp_multipliers=[0.5, 0.25])),
    "the largest alone": (
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(**GEMMA_3N, activation_sparsity_pattern=[0.95, 0.0]),
    ),
    "halves": (
        hf.MoonshineForConditionalGeneration,
        hf.MoonshineConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
        ),
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_computes_more_is_refused(what: str) -> None:
    cls, config = OTHERS[what]
    with pytest.raises(ValueError, match=r"has an FFN \(\w+\) that computes more than .* SptConfig\(ffn=False\)"):
        sparsify(cls(config), SptConfig(**SETTINGS))


class Clamped(torch.nn.Module):
    """As in DeepSeek-V4: what random states of the usual size do not show."""

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(dense, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(states).clamp(max=50.0)) * self.up_proj(states).clamp(-50.0, 50.0)
        found: torch.Tensor = self.down_proj(inner)
        return found


def test_a_clamp_is_refused_and_other_layers_are_not() -> None:
    model = build("llama")
    model.model.layers[1].mlp = Clamped(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"layers\.1 .* has an FFN \(Clamped\)"):
        find_feed_forwards(model)
    assert len(find_feed_forwards(model, 0)) == 1


def test_the_same_where_nothing_is_to_be_left_out() -> None:
    cls, config = hf.FalconH1ForCausalLM, hf.FalconH1Config(**FALCON, mlp_multipliers=[1.0, 1.0])
    torch.manual_seed(0)
    model, ids = cls(config).eval(), inputs("llama")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(sparsify(model, SptConfig(**SETTINGS))(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_weights_that_are_elsewhere_are_taken(dtype: torch.dtype) -> None:
    assert len(find_feed_forwards(build("gemma").to(dtype))) == 2
    assert len(find_feed_forwards(build("gemma").to("meta"))) == 2
    model = build("t5").to(dtype)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()  # as from_pretrained does for float16
    assert len(find_feed_forwards(model)) == 4


def test_looking_for_them_leaves_modes_and_random_numbers_alone() -> None:
    model = build("t5")
    model.encoder.block[0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    find_feed_forwards(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes


DROPPING: dict[str, tuple[type, Any]] = {
    "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART, activation_dropout=0.5)),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig(**WHISPER, activation_dropout=0.5)),
    "gte": (hf.GteModel, hf.GteConfig(**SIZES, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.0)),
    "seed-oss": (hf.SeedOssForCausalLM, hf.SeedOssConfig(**LLAMA, head_dim=8, residual_dropout=0.5)),
    "starcoder2": (hf.Starcoder2ForCausalLM, hf.Starcoder2Config(**LLAMA, residual_dropout=0.5)),
}


@pytest.mark.parametrize("name", DROPPING)
@torch.no_grad()
def test_dropout_falls_where_it_did(name: str) -> None:
    cls, config = DROPPING[name]
    torch.manual_seed(0)
    model, ids = cls(config), inputs("llama")["input_ids"]
    given: dict[str, Any] = {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    if name == "whisper":
        given = {"input_features": torch.randn(3, 8, 40), "decoder_input_ids": ids[:, :8]}
    elif not model.config.is_encoder_decoder:
        del given["decoder_input_ids"]

    def answer(training: bool) -> torch.Tensor:
        torch.manual_seed(0)
        with in_mode(model, training=training):
            found: torch.Tensor = model(**given)[0]
        return found

    expected = [answer(True), answer(False)]
    sparsify(model, SptConfig(**SETTINGS))
    feed_forwards = [each for _, each in sparsification(model).feed_forwards]
    assert torch.equal(answer(False), expected[1])
    if name in ("bart", "whisper", "gte"):  # neurons are dropped, not outputs
        states = torch.randn(5, 32)
        assert all(layer.train()(states).count_nonzero() == states.numel() for layer in feed_forwards)
        draws = torch.stack([feed_forwards[0](states) for _ in range(2000)])
        within = 6 * draws.std(0) / 2000**0.5  # standard errors
        assert ((draws.mean(0) - feed_forwards[0].eval()(states)).abs() < within + 1e-6).all()
        assert (draws.std(0) > 0).all()
    for layer in feed_forwards:
        layer.dense = True
    assert torch.equal(answer(True), expected[0])  # the same draws
    desparsify(model)
    assert all(map(torch.equal, [answer(True), answer(False)], expected))
