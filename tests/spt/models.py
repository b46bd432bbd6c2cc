"""Tiny models of the architectures that can be made sparse."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from sparsepeft.spt import SptConfig, sparsification, sparsify

V, T = 99, 24
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": V}
_LLAMA = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
_OPT = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"ffn_dim": 64, "word_embed_proj_dim": 32}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": V}

DECODERS: dict[str, tuple[type, Any]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA)),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_LLAMA, head_dim=16)),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**_LLAMA, sliding_window=9)),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**_LLAMA, head_dim=16)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(**_GPT2)),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig(**_OPT)),
}
ENCODERS: dict[str, tuple[type, Any]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig(**SIZES)),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig(**SIZES, max_position_embeddings=64)),
}
FEED_FORWARD_ONLY: dict[str, tuple[type, Any]] = {
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**_T5, decoder_start_token_id=0)),
    "t5-gated": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(**_T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    ),
}
_GEMMA_4 = _LLAMA | {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": V,
    "sliding_window": 9,
}
SHARED_KEYS: dict[str, tuple[type, Any]] = {"gemma4": (hf.Gemma4ForCausalLM, hf.Gemma4TextConfig(**_GEMMA_4))}
_MOE = _LLAMA | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_DEEPSEEK = {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1} | dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8
)
EXPERTS: dict[str, tuple[type, Any]] = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**_LLAMA, num_local_experts=4)),
    "qwen2-moe": (hf.Qwen2MoeForCausalLM, hf.Qwen2MoeConfig(**_MOE, shared_expert_intermediate_size=64, num_experts=4)),
    "deepseek-v3": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**_MOE | _DEEPSEEK, n_routed_experts=4, first_k_dense_replace=1),
    ),
    "switch": (
        hf.SwitchTransformersForConditionalGeneration,
        hf.SwitchTransformersConfig(**_T5, num_experts=4, decoder_start_token_id=0),
    ),
}
ALL = DECODERS | ENCODERS | FEED_FORWARD_ONLY
# The projections that LoRA extends: one of attention, and those of the FFN.
TARGETS = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "opt": ["q_proj", "fc1", "fc2"],
    "bert": ["query", "intermediate.dense", "output.dense"],
    "t5-gated": ["q", "wi_0", "wi_1", "wo"],
}


def build(name: str) -> Any:
    """A model with weights large enough that every part matters."""
    cls, config = (ALL | EXPERTS | SHARED_KEYS)[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def inputs(name: str, padding: str | None = "left", batch: int = 3, length: int = T) -> dict[str, torch.Tensor]:
    """A batch with one padded row."""
    ids = torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :5] = 0
    elif padding == "right":
        mask[1, -5:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return found | {"decoder_input_ids": ids[:, :7]} if name.startswith("t5") else found


def sparse(name: str, padding: str | None = None, batch: int = 3, **values: Any) -> Any:
    """A model made sparse, attention and FFNs."""
    settings = {"attention": name not in FEED_FORWARD_ONLY, "top_l": 5, "num_blocks": 4, "num_active_blocks": 2}
    settings["values"] = "routed"
    return sparsify(build(name), SptConfig(**settings | values), inputs(name, padding, batch))


def plain_name(key: str) -> str:
    """The name that a projection has in the dense model: it may stand below the activation in the sparse one."""
    for moved in ("intermediate.intermediate_act_fn", "intermediate-intermediate_act_fn", "activation_fn"):
        key = key.replace(f".{moved}.", ".").replace(f"{moved}-", "").replace(f"{moved}.", "")
    return key


def change_routers(model: Any) -> Any:
    """``model`` with other routers, as if it had been trained without an adapter."""
    with torch.no_grad():
        for _, routed in sparsification(model).feed_forwards:
            for parameter in routed.spt_router.current.parameters():
                parameter.mul_(-1.5)
    return model


def logits(model: Any, name: str, padding: str | None = "left", **kwargs: Any) -> torch.Tensor:
    """What a model answers, padding set to zero."""
    given = inputs(name, padding)
    with torch.no_grad():
        found = model(**given, **kwargs).logits
    if found.dim() == 3 and not name.startswith("t5"):
        found = found * given["attention_mask"][..., None]
    return found
