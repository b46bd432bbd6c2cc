"""Language models: loading, extending by an adapter, reading back from a run's folder, perplexity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from sparsepeft.errors import UserError
from sparsepeft.methods.models import (
    Model,
    TrainedRun,
    attach_trained,
    check_all_loaded,
    load_model_config,
    not_loaded,
)
from sparsepeft.models import language_model_loss
from sparsepeft.models.modes import in_mode

CALIBRATION_BLOCKS = 8
HELD_OUT_TOKENS = 8192  # on which a budget is kept, besides
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_language_model(
    model: str, masked: bool = False, dtype: torch.dtype = torch.float32, *, is_trained: bool = False
) -> tuple[PreTrainedModel, bool]:
    """A language model in eval mode, and whether it is causal (else masked).

    Args:
        model: hub id or folder.
        masked: take masked language models, too.
        dtype: of the weights.
        is_trained: it is a fully tuned run's, which has weights for all of the model.

    Raises:
        UserError: there is no such model, it is of another kind, or weights of a trained one are missing.
    """
    config = load_model_config(model, "language model")
    is_decoder = getattr(config, "is_decoder", False) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and is_decoder and not config.is_encoder_decoder
    is_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_causal and not config.is_encoder_decoder
    if not is_causal and not (masked and is_masked):
        expected = "a causal or masked language model" if masked else "a causal language model"
        raise UserError(f"The model {model!r} is of type {config.model_type}, but {expected} is needed; pass another.")
    loader: Any = AutoModelForCausalLM if is_causal else AutoModelForMaskedLM
    try:
        loaded, loading = loader.from_pretrained(model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("language model", model, error)) from error
    if is_trained:
        check_all_loaded(model, loading)
    return loaded.eval(), is_causal


def load_trained_language_model(run: TrainedRun, dtype: torch.dtype = torch.float32) -> Model:
    """The trained model of a run, in eval mode; ``dtype`` is that of the backbone's weights.

    Raises:
        UserError: files are missing, truncated or foreign, or the backbone is another.
    """
    model, _ = load_language_model(run.backbone, dtype=dtype, is_trained=run.method == "full")
    return model if run.method == "full" else attach_trained(model, run)


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
    total = 0.0
    with in_mode(model, training=False):
        for batch in blocks.split(batch_size):
            ids = batch.to(device)
            with torch.autocast(device.type, HALF_DTYPES.get(precision), enabled=precision in HALF_DTYPES):
                total += float(language_model_loss(model, ids)) * len(ids)
    loss = total / len(blocks)
    perplexity = torch.tensor(loss, dtype=torch.float64).exp()  # infinite where math.exp would raise
    return {"perplexity": float(perplexity), "loss": loss}
