"""What can be measured, and how each system runs a plan; built inside a process of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sparsepeft.devices import keep_freed_memory
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.inference.views import sharing_tensors
from sparsepeft.methods.models import adapter_config, attach, load_tokenizer
from sparsepeft.methods.recipes import get_recipe
from sparsepeft.models.onednn import is_onednn_faster, onednn_product
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, load_batches
from sparsepeft_research.benchmarks.settings import (
    ADAPTED,
    BACKBONE,
    ENGINE,
    ENGINE_UPPER,
    FULL,
    ONNX,
    OPENVINO,
    UNFUSED,
)

QUANTIZED = (BACKBONE, FULL)
SHARING = (BACKBONE, *ADAPTED, UNFUSED)  # which can run on one backbone's tensors
MATRIX_PRODUCT, LOADING = "matrix product", "loading"  # processes that are no systems to choose

_TASK = "task{}"
_VALUES_STD = 0.02

Batch = dict[str, Tensor]


def prepare_system(settings: dict[str, Any]) -> dict[str, Pass]:
    """Build the system that a process's settings name, or what its plans name of several that share a backbone.

    Returns:
        Its passes by the plan's name: each runs all of the plan's batches.
    """
    torch.manual_seed(settings["seed"])
    system, plans = settings["system"], settings["plans"]
    if system == MATRIX_PRODUCT:
        dtype = getattr(torch, settings["precision"])
        return {plan["name"]: _matrix_product(plan["sizes"], dtype) for plan in plans}
    if system in (ENGINE, ENGINE_UPPER):
        keep_freed_memory()  # as a program that serves would
        engine = build_engine(settings)
        return {plan["name"]: _engine_pass(engine, plan) for plan in plans}
    runs: dict[str, Any] = {}
    if system == FULL:
        runs[system] = partial(_run_copies, _copies(settings))
    else:
        backbone = load_model(settings["model"], _stored(settings["precision"]))
        for name in dict.fromkeys(plan["system"] for plan in plans):
            model = _adapted(settings, name, sharing_tensors(backbone))
            runs[name] = partial(_run_adapted, model, settings["num_tasks"])
    return {plan["name"]: partial(runs[plan["system"]], load_batches(plan["tensors"]), plan["mode"]) for plan in plans}


def build_engine(settings: dict[str, Any]) -> MultiTaskEngine:
    """An engine with the settings' tasks, all read from one folder."""
    tokenizer = load_tokenizer(settings["model"])
    tokenizer.model_max_length = min(tokenizer.model_max_length, settings["max_length"])
    tasks = {_TASK.format(i): settings["task_folder"] for i in range(settings["num_tasks"])}
    dtype = getattr(torch, settings["precision"])
    budget = settings["token_budget"]
    return MultiTaskEngine(settings["model"], tasks, tokenizer=tokenizer, dtype=dtype, token_budget=budget)


def save_task(model: str, folder: Path, layers: Sequence[int] | None = None, method: str = "spartan") -> Path:
    """Save a task of the paper's sizes with random values, in all layers or in some."""
    settings = dict(get_recipe("paper", method).adapter) | ({"layers_to_transform": list(layers)} if layers else {})
    adapted = _attach(load_model(model, torch.float32), method, settings, num_tasks=1)
    adapted.save_pretrained(str(folder), selected_adapters=[_TASK.format(0)])
    return folder / _TASK.format(0)


def export_format(precision: str) -> str | None:
    """In which format a system is exported for a precision; None where PyTorch runs it."""
    return next((start.rstrip("-") for start in (ONNX, OPENVINO) if precision.startswith(start)), None)


def load_model(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The backbone with a head of two labels, in eval mode."""
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype)
    return loaded.eval()


def _adapted(settings: dict[str, Any], system: str, backbone: PreTrainedModel) -> Any:
    """The backbone alone, or with an adapter for each task."""
    model: Any = backbone
    if system != BACKBONE:
        method = "spartan" if system == UNFUSED else system
        values = dict(get_recipe("paper", method).adapter) | ({"impl": "torch"} if system == UNFUSED else {})
        model = _attach(backbone, method, values, settings["num_tasks"])
    return _quantized(model) if settings["precision"] == "int8" else model


def _copies(settings: dict[str, Any]) -> list[nn.Module]:
    """A whole model for each task, as full fine-tuning leaves it."""
    model = load_model(settings["model"], _stored(settings["precision"]))
    copies: list[nn.Module] = [model, *(copy.deepcopy(model) for _ in range(settings["num_tasks"] - 1))]
    return [_quantized(one) for one in copies] if settings["precision"] == "int8" else copies


@torch.inference_mode()
def _run_adapted(model: Any, num_tasks: int, batches: list[Batch], mode: str) -> list[Tensor]:
    mixed = mode == "mixed"
    names = [{"adapter_names": _names(batch, num_tasks)} if mixed else {} for batch in batches]
    return [model(**batch, **more).logits for batch, more in zip(batches, names, strict=True)]


@torch.inference_mode()
def _run_copies(models: list[nn.Module], batches: list[Batch], mode: str) -> list[Tensor]:
    if mode != "mixed":
        return [models[0](**batch).logits for batch in batches]
    logits = []
    for batch in batches:
        names = _names(batch, len(models))
        for number, model in enumerate(models):
            rows = [row for row, name in enumerate(names) if name == _TASK.format(number)]
            if rows:
                logits.append(model(**{key: tensor[rows] for key, tensor in batch.items()}).logits)
    return logits


def _engine_pass(engine: MultiTaskEngine, plan: dict[str, Any]) -> Pass:
    texts = [tuple(text) if len(text) > 1 else text[0] for text in plan["texts"]]
    tasks, mode = list(engine.tasks), plan["mode"]

    def answer() -> None:
        if mode == "all":
            engine.predict_all(texts, on_error="raise")
        elif mode == "separate":
            for task in tasks:
                engine.predict([(task, text) for text in texts], on_error="raise")
        else:
            names = tasks if mode == "mixed" else tasks[:1]
            engine.predict([(names[i % len(names)], text) for i, text in enumerate(texts)], on_error="raise")

    return answer


def _matrix_product(sizes: Sequence[int], dtype: torch.dtype) -> Pass:
    rows, inner, columns = sizes
    inputs, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)

    form = onednn_product if is_onednn_faster(dtype) else nn.functional.linear

    @torch.inference_mode()
    def product() -> list[Tensor]:
        return [form(inputs, weight)]

    return product


def _attach(backbone: PreTrainedModel, method: str, values: dict[str, Any], num_tasks: int) -> PeftModel:
    """The backbone with an adapter for each task, the first active, of random values."""
    shared = {id(parameter) for parameter in backbone.parameters()}
    config = adapter_config(method, values)
    assert config is not None  # only full fine-tuning has none
    config.inference_mode = True
    model = attach(backbone, config, method, adapter_name=_TASK.format(0))
    for number in range(1, num_tasks):
        model.add_adapter(_TASK.format(number), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in shared:  # fresh adapters are the identity, which some of them skip
                parameter.normal_(std=_VALUES_STD)
    return model.eval()


def _names(batch: Batch, num_tasks: int) -> list[str]:
    """A task for each row, rows of a task side by side."""
    size = len(batch["input_ids"])
    return [_TASK.format(row * num_tasks // size) for row in range(size)]


def _stored(precision: str) -> torch.dtype:
    return torch.float32 if precision == "int8" else getattr(torch, precision)


def _quantized(model: nn.Module) -> nn.Module:
    """Linear layers in int8, activations quantized as they come (dynamic), by oneDNN."""
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it moves to torchao, whose eager form is slower on a CPU
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantized
