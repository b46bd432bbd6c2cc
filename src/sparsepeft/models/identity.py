"""Whether a saved adapter stands on the backbone it was trained on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_NUM_TENSORS = 24
_NUM_VALUES = 8


def backbone_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter of the bare model, through PEFT's wrappers and accelerate's offloading."""
    for full_name, parent, name, parameter in _parameters(module, prefix):
        yield full_name, parameter if parameter.device.type != "meta" else _offloaded(parent, name, parameter)


def _parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Full name, module, name in it and tensor of every parameter of the bare model."""
    if not getattr(module, "is_backbone", True):
        return  # an adapter's own, without being a PEFT layer
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, module, name, parameter
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.")


def _offloaded(module: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The value that accelerate keeps elsewhere for a parameter on the meta device; the parameter if there is none."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        weights = getattr(each, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return parameter


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether transformers read this tensor from a checkpoint (rather than initialising it).

    It marks the parameter itself, and ``copy.deepcopy`` drops the marks: see :func:`checkpoint_names`.
    """
    return bool(getattr(parameter, "_is_hf_initialized", False))


def checkpoint_names(model: nn.Module) -> set[str]:
    """Names of the tensors in the checkpoint that a model was read from, without its class's own prefix.

    None if it has no safetensors on this machine (nothing is downloaded).
    """
    name = getattr(model, "name_or_path", "")
    options: dict[str, Any] = {
        "revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    names: Iterable[str] = ()
    if name and (path := cached_file(name, SAFE_WEIGHTS_NAME, **options)):
        with safe_open(path, "pt") as file:
            names = file.keys()
    elif name and (path := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)):
        with open(path, encoding="utf-8") as file:
            names = json.load(file)["weight_map"]
    return {without_prefix(model, name) for name in names}


def without_prefix(model: nn.Module, name: str) -> str:
    """A tensor's or module's name without what the model's class puts before its backbone's."""
    prefix = getattr(model, "base_model_prefix", "") or ""
    return name.removeprefix(f"{prefix}.")


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether the tensor is stored in a quantized form (an integer tensor or a tensor subclass)."""
    return type(parameter) not in (nn.Parameter, torch.Tensor) or not parameter.is_floating_point()


def is_sparse(model: nn.Module) -> bool:
    """Whether the model has parts that are neither the backbone's nor PEFT's: those of a sparse model."""
    return any(not getattr(module, "is_backbone", True) for module in model.modules())


def fingerprint(model: nn.Module, exclude: Iterable[str] = (), always: Iterable[str] = ()) -> dict[str, Any]:
    """Sampled values of the tensors that make up the backbone.

    Args:
        model: the bare or the adapted model; offloaded tensors are fetched where accelerate's hooks say how.
        exclude: names of modules that are no part of the backbone (the head, embeddings that were resized).
        always: names of modules of which every tensor is sampled; of the others, a few dozen are.

    Returns:
        ``{"sparse": bool, "dtype": str, "quantized": bool, "tensors": {name: {"shape": [...], "values": [...]}}}``, a
        few kilobytes.
        Names leave out the model class's own prefix, so that ``BertModel`` and ``BertForSequenceClassification``
        of one checkpoint agree.
    """
    exclude = tuple(exclude)
    named = _comparable(model, exclude)
    plain = {
        name: tensor for name, tensor in named.items() if not is_quantized(tensor) and tensor.device.type != "meta"
    }
    names = sorted(plain)
    step = max(1, len(names) // _NUM_TENSORS)
    sampled = set(names[::step][:_NUM_TENSORS]) | (plain.keys() - _comparable(model, (*exclude, *always)).keys())
    chosen = sorted(sampled)
    return {
        "sparse": is_sparse(model),
        "dtype": str(next(iter(plain.values())).dtype).removeprefix("torch.") if plain else "unknown",
        "quantized": len(plain) < len(named),
        "tensors": {name: {"shape": _shape(plain[name]), "values": _sample(plain[name])} for name in chosen},
    }


def check_fingerprint(
    expected: dict[str, Any], model: nn.Module, exclude: Iterable[str], expected_name: str, found_name: str
) -> None:
    """Raise unless ``model`` is the backbone that ``expected`` was taken from.

    Values are compared within the coarser of the two dtypes' resolution. What is excluded is not compared. Quantized
    tensors cannot be; a warning says so.

    Raises:
        ValueError: another backbone, naming both and the override.
    """
    if expected.get("sparse") and not is_sparse(model):
        raise ValueError(
            f"This adapter was trained on a sparse model, made from {expected_name!r}, but it is being attached to a "
            "dense one; load it with sparsepeft.load_sparse(model, folder), which makes the model sparse first."
        )
    named = _comparable(model, exclude)
    excluded = _comparable(model, ()).keys() - named.keys()
    tensors = {name: saved for name, saved in expected["tensors"].items() if name not in excluded}
    compared = 0
    for name, saved in tensors.items():
        tensor = named.get(name)
        if tensor is not None and (is_quantized(tensor) or tensor.device.type == "meta"):
            continue
        if tensor is None or _shape(tensor) != saved["shape"] or not _close(tensor, saved["values"], expected["dtype"]):
            if is_sparse(model):
                how = "a model that was made sparse in another way" if expected.get("sparse") else "the dense model"
                raise ValueError(
                    f"This adapter was trained on {how} (from {expected_name!r}), but it is being attached to a sparse "
                    f"one, whose tensor {name!r} {_difference(tensor, saved)}; pass the dense backbone, or make the "
                    "model sparse as in training."
                )
            raise ValueError(
                f"This adapter was trained on the backbone {expected_name!r}, but it is being attached to "
                f"{found_name!r}, whose tensor {name!r} {_difference(tensor, saved)}; load the right backbone, or set "
                "check_backbone=False in the adapter's config (PeftConfig.from_pretrained) and pass that config, if "
                "you know that it fits."
            )
        compared += 1
    if compared < len(tensors) or expected["quantized"]:
        warnings.warn(
            f"The backbone {found_name!r} is quantized or offloaded (here or when the adapter was trained): only "
            f"{compared} sampled tensors could be compared, so make sure that it is the model the adapter was trained "
            "on.",
            UserWarning,
            stacklevel=2,
        )


def _comparable(model: nn.Module, exclude: Iterable[str]) -> dict[str, torch.Tensor]:
    """The backbone's tensors by class-independent name: those read from the checkpoint, if any were."""
    excluded = tuple(f"{name}." for name in exclude)
    named = {
        n: p for n, p in backbone_parameters(model) if not (excluded and n.startswith(excluded)) and 0 not in _shape(p)
    }
    if any(is_loaded(p) for p in named.values()):
        # Offloading and quantizing make new tensors, so whether one was loaded is only known of those that stayed.
        offloaded = {n for n, _, _, p in _parameters(model) if p.device.type == "meta"}
        named = {n: p for n, p in named.items() if is_loaded(p) or n in offloaded or is_quantized(p)}
    return {without_prefix(model, n): p for n, p in named.items()}


def _shape(tensor: torch.Tensor) -> list[int]:
    """The tensor's shape; DeepSpeed's ZeRO-3 leaves none of it in its place, but notes it."""
    return list(getattr(tensor, "ds_shape", tensor.shape))


def _sample(tensor: torch.Tensor) -> list[float]:
    with gather_params_ctx([tensor], modifier_rank=None):  # type: ignore[list-item]  # does nothing without ZeRO-3
        flat = tensor.detach().reshape(-1)
        last = flat.numel() - 1
        # In float32, whose rounding saved fingerprints have; above 2**24 values it may round past the last one.
        index = torch.linspace(0, last, min(_NUM_VALUES, flat.numel()), dtype=torch.float32, device="cpu").long()
        index = index.clamp(max=last).to(flat.device)
        return [float(value) for value in flat[index].to("cpu", torch.float64)]


def _close(tensor: torch.Tensor, values: list[float], dtype: str) -> bool:
    saved_dtype = getattr(torch, dtype, torch.float32)
    resolution = max(torch.finfo(tensor.dtype).eps, torch.finfo(saved_dtype).eps)
    sampled, expected = torch.tensor(_sample(tensor)), torch.tensor(values)
    return torch.allclose(sampled, expected, rtol=2 * resolution, atol=1e-6)


def _difference(tensor: torch.Tensor | None, saved: dict[str, Any]) -> str:
    if tensor is None:
        return "is missing"
    if _shape(tensor) != saved["shape"]:
        return f"has shape {_shape(tensor)} instead of {saved['shape']}"
    return "has other values"


def embedding_layers(model: nn.Module) -> list[str]:
    """Names of the modules that hold a transformers model's input embeddings and the scores of its tokens."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, getter, lambda: None)())
        except NotImplementedError:  # models of several parts, such as CLIP
            continue
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def resized_embeddings(model: nn.Module) -> list[str]:
    """:func:`embedding_layers` by all their names, if the vocabulary is not the checkpoint's; else none.

    Encoder and decoder have the same embeddings, as a module under several names or as a tensor in several modules.

    Told as PEFT tells it, by the config in the checkpoint; without one to read, nothing counts as resized.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "")
    size = (
        getattr(config.get_text_config(), "vocab_size", None) if name and hasattr(config, "get_text_config") else None
    )
    if size is None:
        return []
    try:
        saved = type(config).from_pretrained(name, local_files_only=True)
    except OSError:
        return []
    changed = getattr(saved.get_text_config(), "vocab_size", size) != size
    if not changed:
        return []
    tensors = {id(tensor) for name in embedding_layers(model) for tensor in model.get_submodule(name).parameters()}
    return [name for name, module in model.named_modules(remove_duplicate=False) if _holds(module, tensors)]


def _holds(module: nn.Module, tensors: set[int]) -> bool:
    return any(id(tensor) in tensors for tensor in module.parameters(recurse=False))
