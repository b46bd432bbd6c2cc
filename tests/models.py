"""Tiny random models of every architecture the package is tested on, with inputs for them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model

from sparsepeft import BitFitConfig, BottleneckConfig, SpartanConfig
from sparsepeft.tuners.layer import TaskTunerLayer

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
    "init_std": 0.3,  # with the default, greedy decoding repeats one token whatever the adapter
}
_T5 = {
    "decoder_start_token_id": 0,
    "d_model": D,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": L,
    "num_heads": 4,
    "vocab_size": V,
}
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
    "electra": Architecture(lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**_TEXT, embedding_size=16))),
    "deberta-v2": Architecture(
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(**_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"])
        )
    ),
    "mpnet": Architecture(lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**_TEXT))),
    "modernbert": Architecture(lambda: hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**_MODERN))),
    "gpt2": Architecture(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=D, n_layer=L, n_head=4, vocab_size=V, bos_token_id=1, eos_token_id=2)
        ),
        has_head=False,
    ),
    "opt": Architecture(
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=D,
                num_hidden_layers=L,
                num_attention_heads=4,
                ffn_dim=64,
                vocab_size=V,
                word_embed_proj_dim=D,
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
        lambda: hf.XLNetForSequenceClassification(
            hf.XLNetConfig(d_model=D, n_layer=L, n_head=4, d_inner=64, vocab_size=V)
        )
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


SMALL = {"num_parents": 6, "num_children": 2, "top_k": 3}
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "spartan": lambda **values: SpartanConfig(**(SMALL | values)),
    "pfeiffer": lambda **values: BottleneckConfig(style="pfeiffer", **({"reduction_factor": 5} | values)),
    "houlsby": lambda **values: BottleneckConfig(style="houlsby", **({"reduction_factor": 6.5} | values)),
    "bitfit": lambda **values: BitFitConfig(**values),
}
# XLNet's layers add the residual inside their sublayers; the others below have no biases.
REFUSED = {
    "houlsby": ["xlnet"],
    "bitfit": ["modernbert", "llama", "llama-seqcls", "qwen3", "gemma", "mixtral", "t5"],
}
SUPPORTED = [(method, name) for method in METHODS for name in ARCHITECTURES if name not in REFUSED.get(method, ())]


def randomize(model: torch.nn.Module, adapter: str = "default", std: float = 0.5) -> None:
    """Give a fresh adapter (memory, head, norms) other values, so that it changes outputs; the same ones each time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." not in name:
                continue
            seed = zlib.crc32(f"{adapter} {name.removeprefix('base_model.model.')}".encode())
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            if "spartan_memory" in name:
                parameter.copy_(noise * std)
            elif "norm" in name.lower():
                parameter.add_((noise * 0.2).to(parameter.dtype))
            else:  # the head
                parameter.copy_(noise * 0.2)


def adapted(
    name: str | Any, adapter: str = "default", *, config: PeftConfig | None = None, random: bool = True, **values: Any
) -> PeftModel:
    """The tiny model ``name`` (or a given model) in eval mode with the adapter of ``config``, else a small memory."""
    backbone = build(name) if isinstance(name, str) else name
    model = get_peft_model(backbone, config or METHODS["spartan"](**values), adapter_name=adapter).eval()
    if random:
        randomize(model, adapter)
    return model


def add(model: PeftModel, adapter: str, *, config: PeftConfig | None = None, **values: Any) -> None:
    """Add a further adapter with random values."""
    model.add_adapter(adapter, config or METHODS["spartan"](**values))
    randomize(model, adapter)


@torch.no_grad()
def run(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """The tensor a model's answer is compared by."""
    return first_tensor(model(**inputs, **kwargs))


def task_layers(model: Any) -> list[TaskTunerLayer]:
    """The extended layers of an adapted model."""
    return [module for module in model.modules() if isinstance(module, TaskTunerLayer)]


def adapter_parameters(model: Any, adapter: str = "default") -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters in the layers, without its head."""
    layers = [name for name, module in model.named_modules() if isinstance(module, TaskTunerLayer)]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name and name.startswith(tuple(f"{layer}." for layer in layers))
    }


def answers(model: PeftModel, inputs: dict[str, torch.Tensor], *adapters: str) -> dict[str, torch.Tensor]:
    """What each adapter, and the bare backbone as ``__base__``, answers alone."""
    found = {}
    for adapter in adapters:
        model.set_adapter(adapter)
        found[adapter] = run(model, inputs)
    with model.disable_adapter():
        found["__base__"] = run(model, inputs)
    return found


def without_dropout(model: Any) -> Any:
    """``model`` with every dropout at zero, so that two runs in training mode can be compared."""
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(vars(module).get(attribute), float):
                setattr(module, attribute, 0.0)
    return model


def labelled_inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs of the tiny model ``name`` with labels for its loss."""
    inputs = ARCHITECTURES[name].inputs()
    text = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return inputs | {"labels": torch.tensor([1, 0, 1]) if ARCHITECTURES[name].has_head else text}


def cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs whose floating-point tensors have ``dtype``."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def gradients(model: Any, inputs: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of ``scale`` times the model's loss, by parameter."""
    model.zero_grad()
    (model(**inputs).loss * scale).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal up to float32's rounding in sums of another order, measured by each gradient's largest entry."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def backward_through_everything(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Backward from all that a model returns, for models that have no loss of their own."""
    outputs = [v for v in model(**inputs).values() if isinstance(v, torch.Tensor) and v.requires_grad]
    sum(v.float().square().mean() for v in outputs).backward()


def checkpoint(model: PeftModel, use_reentrant: bool | None) -> None:
    """Turn on gradient checkpointing of one kind; None leaves it off."""
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def save_backbone(name: str | Any, folder: Path) -> str:
    """Save a tiny model as a checkpoint and return its path."""
    model = build(name) if isinstance(name, str) else name
    model.save_pretrained(folder)
    return str(folder)
