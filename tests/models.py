"""Tiny random models of every architecture the package is tested on, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

D, L, V = 32, 3, 99
_TEXT = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": V,
}
_DECODER = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}
_VISION = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
_SEQ2SEQ = {
    "d_model": D,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": D, "d_kv": 8, "d_ff": 64, "num_layers": L, "num_heads": 4, "vocab_size": V}
_MODERN = _TEXT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _text_inputs(batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0  # one padded row
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _seq2seq_inputs() -> dict[str, torch.Tensor]:
    return _text_inputs() | {"decoder_input_ids": _text_inputs(length=5)["input_ids"].clamp(min=3)}


def _eos_inputs() -> dict[str, torch.Tensor]:
    inputs = _text_inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
    inputs["input_ids"][:, -1] = 2  # BART classifies at the end-of-sequence token
    return inputs


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def _speech() -> dict[str, torch.Tensor]:
    features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _text_inputs(length=5)["input_ids"]}


def _clip_inputs() -> dict[str, torch.Tensor]:
    return _pixels() | _text_inputs()


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model; ``num_blocks`` layers are to be found in it, ``calls`` of them run per pass."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = _text_inputs
    num_blocks: int = L
    has_head: bool = True


def _whisper() -> hf.WhisperConfig:
    return hf.WhisperConfig(**_SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=20)


def _clip() -> hf.CLIPConfig:
    return hf.CLIPConfig(text_config=_TEXT | {"eos_token_id": 2}, vision_config=_VISION, projection_dim=16)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT))),
    "roberta": Architecture(lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT))),
    "distilbert": Architecture(
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(dim=D, n_layers=L, n_heads=4, hidden_dim=64, vocab_size=V)
        )
    ),
    "albert": Architecture(
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**_TEXT, embedding_size=16)), num_blocks=1
    ),
    "electra": Architecture(
        lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**_TEXT, embedding_size=16))
    ),
    "deberta-v2": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
        )
    ),
    "mpnet": Architecture(lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**_TEXT))),
    "modernbert": Architecture(lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**_MODERN))),
    "gpt2": Architecture(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=D, n_layer=L, n_head=4, vocab_size=V, bos_token_id=1, eos_token_id=2)),
        has_head=False,
    ),
    "opt": Architecture(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=D, num_hidden_layers=L, num_attention_heads=4, ffn_dim=64, vocab_size=V, word_embed_proj_dim=D
            )
        ),
        has_head=False,
    ),
    "llama": Architecture(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)), has_head=False),
    "llama-seqcls": Architecture(lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER))),
    "qwen3": Architecture(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8)), has_head=False),
    "gemma": Architecture(lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER, head_dim=8)), has_head=False),
    "mixtral": Architecture(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4)), has_head=False
    ),
    "t5": Architecture(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)), _seq2seq_inputs, num_blocks=2 * L, has_head=False
    ),
    "bart": Architecture(
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ)),
        _seq2seq_inputs,
        num_blocks=2 * L,
        has_head=False,
    ),
    "bart-seqcls": Architecture(
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**_SEQ2SEQ)), _eos_inputs, num_blocks=2 * L
    ),
    "vit": Architecture(lambda: hf.ViTForImageClassification(hf.ViTConfig(**_VISION)), _pixels),
    "whisper": Architecture(
        lambda: hf.WhisperForConditionalGeneration(_whisper()), _speech, num_blocks=2 * L, has_head=False
    ),
    "whisper-audiocls": Architecture(
        lambda: hf.WhisperForAudioClassification(_whisper()), lambda: {"input_features": _speech()["input_features"]}
    ),
    "clip": Architecture(lambda: hf.CLIPModel(_clip()), _clip_inputs, num_blocks=2 * L, has_head=False),
    "clip-imagecls": Architecture(lambda: hf.CLIPForImageClassification(_clip()), _pixels),
    "wav2vec2": Architecture(
        lambda: hf.Wav2Vec2ForSequenceClassification(
            hf.Wav2Vec2Config(
                **_TEXT,
                conv_dim=(8, 8),
                conv_stride=(2, 2),
                conv_kernel=(3, 3),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                num_feat_extract_layers=2,
            )
        ),
        lambda: {"input_values": torch.randn(3, 100, generator=torch.Generator().manual_seed(1))},
    ),
    "swin": Architecture(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
        ),
        _pixels,
    ),
    "xlnet": Architecture(
        lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(d_model=D, n_layer=L, n_head=4, d_inner=64, vocab_size=V))
    ),
}


def build(name: str) -> Any:
    """The tiny model ``name`` in eval mode, the same each time."""
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().eval()


def first_tensor(output: Any) -> torch.Tensor:
    """The tensor a model's output is compared by: its logits, or the first thing it returns."""
    for key in ("logits", "logits_per_text", "last_hidden_state"):
        if key in output:
            return output[key]
    raise AssertionError(f"no comparable tensor in {type(output).__name__}")


def randomize(model: torch.nn.Module, adapter: str = "default", std: float = 0.5) -> None:
    """Give a fresh memory values, so that it changes outputs."""
    generator = torch.Generator().manual_seed(hash(adapter) % 1000 if adapter != "default" else 7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"spartan_memory.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
