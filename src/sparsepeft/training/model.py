"""The model of a run: the backbone, made sparse if that is asked for, with the method's adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from sparsepeft.devices import find_device
from sparsepeft.errors import UserError
from sparsepeft.launch import is_sharded, num_processes
from sparsepeft.methods.language_models import HALF_DTYPES, load_language_model, perplexity
from sparsepeft.methods.models import Model, extend, fingerprint_of, load_backbone, to_accelerator
from sparsepeft.methods.sparse import make_sparse
from sparsepeft.models.frozen import hold_frozen_linears
from sparsepeft.models.onednn import is_onednn_faster, use_onednn
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import PLAN
from sparsepeft.spt import Plan, Sparsification
from sparsepeft.training.data import LabelledData, RunData, TextData

Scores = dict[str, float]


@dataclass(frozen=True)
class RunModel:
    """A model that is ready for training.

    Attributes:
        model: the backbone with an adapter, or as it is for full fine-tuning.
        run_values: what ``run.json`` says of the backbone.
        sparsification: what was made sparse; None if the model is dense.
        before: scores of a language model before training: of the dense model, and of the sparse one if it is.
    """

    model: Model
    run_values: dict[str, Any]
    sparsification: Sparsification | None
    before: dict[str, Scores]


def build_model(config: RunConfig, data: LabelledData | TextData, plan: dict[str, Any] | None = None) -> RunModel:
    """Load the backbone, make it sparse, put the adapter on.

    A language model's perplexity is measured before and after it is made sparse, so that what that alone does can be
    seen.

    Args:
        config: of the run.
        data: of the run.
        plan: how its model keeps to a budget, if the run was begun before: times that are measured again would give
            another.

    Raises:
        UserError: the model cannot be loaded, or method and settings do not fit it.
    """
    spt, before = config.spt_config(), {}
    if spt is not None and spt.budget is not None and plan is None and num_processes() > 1:
        raise UserError(
            "A `budget` was given to several processes, which would each measure a plan of their own; make the model "
            "sparse by `sparsepeft sparsify` first, or train in one process."
        )
    set_seed(config.seed)
    if isinstance(data, LabelledData):
        backbone = load_backbone(data.model, data.spec)
    else:
        backbone, _ = load_language_model(data.model)
        to_accelerator(backbone, config.device)
        before["dense"] = text_scores(config, backbone, data)
    run_values = fingerprint_of(backbone, config.method)
    sparsification = None
    if spt is not None:
        to_accelerator(backbone, config.device)
        held_out = data.held_out_batch() if isinstance(data, TextData) and spt.budget is not None else None
        made = None if plan is None else Plan.from_dict(plan)
        sparsification = make_sparse(backbone, spt, data.calibration_batch(), held_out, made)
        if sparsification.plan is not None:
            run_values[PLAN] = sparsification.plan.to_dict()
        if isinstance(data, TextData):
            before["sparse"] = text_scores(config, backbone, data)
    spec = data.spec if isinstance(data, LabelledData) else None
    model = extend(backbone, config.method, spec, config.recipe_values().adapter)
    # Sparse modules read the weights themselves, and cached layers are computed without autocast.
    is_whole = not is_sharded()  # else a process holds a part of the weights, as they were loaded
    if config.precision in HALF_DTYPES and spt is None and not config.cache_frozen_layers and is_whole:
        hold_frozen_linears(model, HALF_DTYPES[config.precision])
    if find_device(config.device).type == "cpu" and is_whole:
        compute_by_onednn(model, config.precision)
    return RunModel(model, run_values, sparsification, before)


def text_scores(config: RunConfig, model: torch.nn.Module, data: RunData) -> Scores:
    """Perplexity on the validation text."""
    return perplexity(model, data.reported["validation"], config.recipe_values().batch_size, config.precision)


def compute_by_onednn(model: torch.nn.Module, precision: str, wanted: bool | None = None) -> None:
    """Let a model's linear layers compute by oneDNN while they are frozen.

    Args:
        model: on a CPU.
        precision: as in :class:`RunConfig`.
        wanted: whether to; None is where it was measured to be faster, see :func:`is_onednn_faster`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if is_onednn_faster(dtype) if wanted is None else wanted:
        use_onednn(model)
