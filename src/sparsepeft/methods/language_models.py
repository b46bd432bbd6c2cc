"""Language models: loading, extending by an adapter, reading back from a run's folder, perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.methods.models import Model, adapter_config, attach, attach_trained, not_loaded
from sparsepeft.methods.recipes import Recipe
from sparsepeft.methods.sparse import count_routers

CALIBRATION_BLOCKS = 8
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_language_model(
    model: str, masked: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, bool]:
    """A language model in eval mode, and whether it is causal (else masked).

    Args:
        model: hub id or folder.
        masked: take masked language models, too.
        dtype: of the weights.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        is_decoder = getattr(config, "is_decoder", False) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and is_decoder and not config.is_encoder_decoder
        is_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_causal and not config.is_encoder_decoder
        if not is_causal and not (masked and is_masked):
            expected = "a causal or masked language model" if masked else "a causal language model"
            raise UserError(
                f"The model {model!r} is of type {config.model_type}, but {expected} is needed; pass another."
            )
        loader = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
        return loader.from_pretrained(model, dtype=dtype).eval(), is_causal
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("language model", model, error)) from error


def add_adapter(model: PreTrainedModel, method: str, recipe: Recipe) -> Model:
    """The model with the method's adapter; as it is for full fine-tuning."""
    config = adapter_config(method, recipe.adapter, task_type=TaskType.CAUSAL_LM)
    return model if config is None else attach(model, config, method)


def load_trained_language_model(
    folder: Path,
    method: str,
    model: str,
    *,
    is_sparse: bool = False,
    dtype: torch.dtype = torch.float32,
    backbone_fingerprint: dict[str, Any] | None = None,
) -> Model:
    """The trained model of a run, in eval mode.

    Args:
        folder: of the run.
        method: of the run.
        model: the backbone.
        is_sparse: it was trained on a sparse model.
        dtype: of the backbone's weights.
        backbone_fingerprint: of the backbone that it was trained on, as its ``run.json`` has it.

    Raises:
        UserError: files are missing, truncated or foreign, or the backbone is another.
    """
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no trained weights yet; finish its training by the same command.")
    if method == "full":
        return load_language_model(str(folder), dtype=dtype)[0]
    backbone, _ = load_language_model(resolve_model(model), dtype=dtype)
    return attach_trained(backbone, folder, is_sparse, backbone_fingerprint)


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, batch_size: int, precision: str = "fp32") -> dict[str, float]:
    """Mean loss of a token, and its exponential.

    Args:
        model: a causal language model, on the device where it is to run.
        blocks: (N, T); in each, T - 1 tokens are predicted, from those before them in it. The first, which begins
            the text or is the text's first, is not.
        batch_size: blocks in a pass.
        precision: fp32, bf16 or fp16.
    """
    device = next(model.parameters()).device
    training, total = model.training, 0.0
    model.eval()
    try:
        for batch in blocks.split(batch_size):
            ids = batch.to(device)
            with torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES):
                total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids)
    finally:
        model.train(training)
    loss = total / len(blocks)
    return {"perplexity": math.exp(loss), "loss": loss}


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trained parameters: all, and of them the routers of a sparse model."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"trained": trained, "routers": count_routers(model)}
