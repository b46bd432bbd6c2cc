"""What is measured: a few Transformer layers, dense or sparse, with LoRA, and a step of fine-tuning them."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlamaConfig, OPTConfig, PretrainedConfig

from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import num_positions
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards
from sparsepeft.spt import SptConfig, sparsification, sparsify
from sparsepeft_research.benchmarks.settings import SptBenchmark
from sparsepeft_research.benchmarks.split import Span, measuring

_VOCABULARY = 1024  # of random stacks; embeddings cost all candidates the same
_CALIBRATION_TOKENS = 1024
_RANK = 16
_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")

# Hidden size: OPT's of 350M (but with its norms before, as all others have them), 1.3B, 2.7B; Llama's of 3B and 7B.
_OPT = {"opt-1024": 1024, "opt-2048": 2048, "opt-2560": 2560}
_LLAMA = {"llama-2560": (2560, 6912), "llama-4096": (4096, 11008)}
STACKS = (*_OPT, *_LLAMA)


def stack_config(model: str, num_layers: int, length: int) -> PretrainedConfig:
    """The config of a named stack of random weights, or of a model's first layers.

    Args:
        model: one of :data:`STACKS`, a hub id or a folder.
        num_layers: layers to keep.
        length: positions that it must take.

    Raises:
        UserError: there is no such model, it has fewer layers, or takes fewer positions.
    """
    if model in _OPT:
        size = _OPT[model]
        return OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=size,
            word_embed_proj_dim=size,
            ffn_dim=4 * size,
            num_hidden_layers=num_layers,
            num_attention_heads=size // 64 if size < 2560 else 32,
            max_position_embeddings=length,
            dropout=0.0,
        )
    if model in _LLAMA:
        size, inner = _LLAMA[model]
        return LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=size,
            intermediate_size=inner,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            max_position_embeddings=length,
        )
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`model={model}` was given, but there is no such model; pass one of {', '.join(STACKS)}, a hub id, or a "
            "folder with a model."
        ) from error
    available = getattr(config, "num_hidden_layers", None)
    if available is None or num_layers > available:
        raise UserError(f"`layers={num_layers}` was given, but {model} has {available}; pass fewer.")
    limit = num_positions(config)
    if limit is not None and length > limit:
        raise UserError(f"`lengths={length}` was given, but {model} takes at most {limit} tokens; pass less.")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):  # some models name the kind of each layer
        config.layer_types = config.layer_types[:num_layers]
    for name in _ATTENTION_DROPOUTS:  # sparse attention has none, so the others get none
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


class Stack:
    """Layers with LoRA on queries and values, and a step of fine-tuning them: forward, backward, AdamW.

    There is no language-modelling head: its logits would cost all candidates the same. The loss is a projection of the
    last hidden states.

    Args:
        benchmark: says of which model, on what; LoRA's weights and the routers are float32 whatever its dtype.
        config: the model's, see :func:`stack_config`.
        length: tokens of a sequence.
        spt: makes the layers sparse; None leaves them dense.
        attention: "sdpa" or "eager", of dense attention.
        checkpointing: compute activations again in backward.
        compiled: through ``torch.compile``.

    Raises:
        UserError: the model cannot be made sparse, or PEFT does not know where its LoRA goes.
    """

    def __init__(
        self,
        benchmark: SptBenchmark,
        config: PretrainedConfig,
        length: int,
        spt: SptConfig | None = None,
        attention: str = "sdpa",
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        self.device, model = benchmark.device, benchmark.model
        torch.manual_seed(benchmark.seed)
        base: Any = _load(benchmark, copy.deepcopy(config), attention)  # each has an attention of its own
        self.ids = torch.randint(config.vocab_size, (benchmark.batch_size, length), device=self.device)
        try:
            if spt is not None:
                sparsify(base, _of_modules(base, spt), self.ids[:1, :_CALIBRATION_TOKENS])
            self.model: PeftModel = get_peft_model(base, LoraConfig(r=_RANK, lora_alpha=2 * _RANK))
        except ValueError as error:
            raise UserError(f"{model} cannot be measured: {error}") from error
        self.model.train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self._run = torch.compile(self.model) if compiled else self.model
        self._direction = torch.randn(config.hidden_size, device=self.device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, refresh: bool = False) -> None:
        """One step; with ``refresh`` one that computes new codebooks, which is otherwise left out."""
        sparse = sparsification(self.model)
        codebooks: list[Any] = [layer.state.current for layer in sparse.attention.values()] if sparse else []
        for each in codebooks:
            each.expected = refresh
        states: Tensor = self._run(input_ids=self.ids, use_cache=False).last_hidden_state
        (states @ self._direction.to(states.dtype)).float().square().mean().backward()
        for each in codebooks:
            each.step(is_due=refresh)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def split(self, attention_names: Sequence[str]) -> dict[str, float]:
        """Milliseconds of one step in attention (projections included), in FFNs and in the rest."""
        base: Any = self.model.get_base_model()
        sparse = sparsification(base)
        modules = [base.get_submodule(name) for name in attention_names]
        if sparse is not None and sparse.feed_forwards:
            feed_forwards = [Span(routed, routed) for _, routed in sparse.feed_forwards]
        else:
            feed_forwards = [_span(each) for each in find_feed_forwards(base)]
        base.enable_input_require_grads()  # else the first layer's backward has no end
        try:
            with measuring({"attention": [Span(m, m) for m in modules], "ffn": feed_forwards}, self.device) as spent:
                start = time.perf_counter()
                self.step()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                total = 1e3 * (time.perf_counter() - start)
        finally:
            base.disable_input_require_grads()
        return {**spent, "rest": total - sum(spent.values())}


def _of_modules(base: Any, spt: SptConfig) -> SptConfig:
    """Settings of single modules by the names in a model without its head, of those that it has."""
    by_name = {name.removeprefix(f"{base.base_model_prefix}."): own for name, own in (spt.overrides or {}).items()}
    known = {name: own for name, own in by_name.items() if name in dict(base.named_modules())}
    return dataclasses.replace(spt, overrides=known or None)


def _span(each: FeedForward) -> Span:
    if each.is_module:
        return Span(each.owner, each.owner)
    return Span(each.part(each.names.up), each.part(each.names.down))


def _load(benchmark: SptBenchmark, config: PretrainedConfig, attention: str) -> Any:
    how: dict[str, Any] = {"attn_implementation": attention, "dtype": getattr(torch, benchmark.dtype)}
    if benchmark.model not in STACKS:
        return AutoModel.from_pretrained(benchmark.model, config=config, **how).to(benchmark.device)
    with torch.device(benchmark.device):
        return AutoModel.from_config(config, **how)
