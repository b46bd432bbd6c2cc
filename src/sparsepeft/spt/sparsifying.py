"""Making a model sparse, in place: what is learnt from a calibration batch, and how well it fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from sparsepeft.planning import read_text
from sparsepeft.planning.batches import read_batch
from sparsepeft.spt.budget import plan_within_budget
from sparsepeft.spt.calibration import Calibration
from sparsepeft.spt.config import SptConfig
from sparsepeft.spt.convert import check_bare, install, sparsification
from sparsepeft.spt.density import answering
from sparsepeft.spt.report import report_attention, report_feed_forwards


def sparsify(
    model: PreTrainedModel, config: SptConfig, calibration_data: Any = None, *, held_out_data: Any = None
) -> PreTrainedModel:
    """Make a model's self-attention and FFNs sparse, in place; PEFT methods go on top afterwards.

    Args:
        model: a transformers model, not yet wrapped by PEFT.
        config: what becomes sparse.
        calibration_data: a typical batch: input ids (B, T), or (T,) for one sequence, as a tensor or lists, or the
            mapping that the model takes.
            Codebooks are made from its queries and keys, and a fraction ``top_l`` is of its length: the most keys that
            a layer attends to in it, which is T for a batch of ids. Not needed without ``attention``. With a ``budget``
            it is what modules are measured on: causal language models predict its next tokens, masked ones the
            ``labels`` that the mapping then has.
        held_out_data: other text, in the same form, on which a plan has to keep to the ``budget`` as well.

    Returns:
        ``model``; ``model.sparsification.report`` says how much it changed, and ``model.sparsification.plan`` what
        each module became and why, where a ``budget`` was given (without ``overrides``, which are a plan).

    Raises:
        TypeError: ``model`` is no bare transformers model, or ``config`` no :class:`SptConfig`.
        ValueError: the model lacks a structure that is needed, sizes do not fit, or the calibration data is unusable.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft import SptConfig, sparsify
        >>> model = AutoModelForCausalLM.from_pretrained("MODEL")
        >>> ids = torch.randint(5, 90, (2, 32))  # of typical text
        >>> model = sparsify(model, SptConfig(top_l=8, num_blocks=4, num_active_blocks=2), calibration_data=ids)
        >>> model.sparsification.config.top_l
        8
    """
    check_bare("sparsify", model)
    if not isinstance(config, SptConfig):
        raise TypeError(f"sparsify got a {type(config).__name__} as its config; expected an SptConfig.")
    if sparsification(model) is not None:
        raise ValueError("The model is sparse already; call desparsify first to convert it with other settings.")
    batch = None if calibration_data is None else read_batch(model, calibration_data, "calibration_data")
    if held_out_data is not None and config.budget is None:
        raise ValueError("held_out_data was passed without a budget to keep on it; set SptConfig(budget=...), too.")
    if batch is None and (config.attention or config.budget is not None):
        needed = "Sparse attention needs calibration_data for its codebooks"
        if config.budget is not None:
            needed = f"budget={config.budget} needs calibration_data to be measured on"
        raise ValueError(f"{needed}; pass a batch of input ids.")
    for name in ("compensation_rank", "reconstruction_rank"):
        if config.ffn and getattr(config, name) and batch is None:
            raise ValueError(
                f"{name}={getattr(config, name)} needs calibration_data to be fitted to; pass a batch of input ids, or "
                f"{name}=0."
            )
    # All that can go wrong does so before the model is touched.
    plan, texts = None, {}
    if config.budget is not None and not config.overrides:
        given = {"calibration": calibration_data} | ({} if held_out_data is None else {"held_out": held_out_data})
        texts = {name: read_text(model, data, f"{name}_data") for name, data in given.items()}
    calibration = Calibration(model, config, batch)
    counted = config.with_length(calibration.length) if calibration.calls else config
    if texts:
        plan = plan_within_budget(model, config, calibration, texts)
        counted = replace(counted, overrides=plan.overrides)
    state = install(model, counted, calibration.codebooks(counted), calibration.starts(counted))
    state.plan = plan
    with answering(model, "sparse"):
        for name, layer in state.attention.items():
            report_attention(state.report, name, layer, calibration.calls[name])
        if batch is not None:
            report_feed_forwards(state.report, state.feed_forwards, calibration.seen)
    return model
