"""Saving and loading sparse models, with an adapter or without one."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from sparsepeft.arguments import check_choice
from sparsepeft.errors import UserError, first_line
from sparsepeft.folders import write_bytes
from sparsepeft.layers.router import InitialRouter
from sparsepeft.models.sublayers import FeedForward, find_feed_forwards, weight_of
from sparsepeft.spt.checkpoint import added_tensors
from sparsepeft.spt.codebooks import Codebooks
from sparsepeft.spt.config import INFER
from sparsepeft.spt.convert import check_bare, install, sparsification
from sparsepeft.spt.state import SptState, read_settings
from sparsepeft.tuners.files import plain_name

SPARSE_WEIGHTS = "spt.safetensors"
_SETTINGS, _CODEBOOKS, _WEIGHTS = "spt_settings.settings", ".spt.state.codebooks", ".spt.state.channel_weights"


def save_sparse(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write what :func:`sparsify` added to a model: settings, codebooks, routers and the order of routed neurons.

    The model's weights are not saved: :func:`load_sparse` takes a dense model and this folder.

    Returns:
        The file.

    Raises:
        ValueError: the model is not sparse, or is wrapped by PEFT.
    """
    if isinstance(model, PeftModel):
        raise ValueError("save_sparse got a PeftModel; its own save_pretrained saves what sparsify added, too.")
    if sparsification(model) is None:
        raise ValueError("The model is not sparse, so there is nothing to save; call sparsify first.")
    states = {name: module.current for name, module in model.named_modules() if isinstance(module, SptState)}
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, state in states.items()
        for key, tensor in state.state_dict().items()
    }
    file = Path(folder) / SPARSE_WEIGHTS
    write_bytes(file, save(tensors))
    return file


def load_sparse(
    model: PreTrainedModel, adapter: str | Path, *, infer: str | None = None, **kwargs: Any
) -> PeftModel | PreTrainedModel:
    """Make a dense model sparse in the way of an adapter's backbone, and load the adapter.

    Args:
        model: the dense backbone.
        adapter: folder or hub id, as for ``PeftModel.from_pretrained``; or a folder that :func:`save_sparse`, or the
            sparse model's ``save_pretrained``, wrote.
        infer: answer as the ``"sparse"`` model, or as the ``"dense"`` one; None as the settings say.
        kwargs: for ``PeftModel.from_pretrained``; ``subfolder`` is looked into for all that a folder may hold.

    Returns:
        The model with its adapter; ``model`` itself, sparse, from a folder without one.

    Raises:
        UserError: there is no adapter, it was not trained on a sparse model or on one of another shape, or the file is
            damaged.
        ValueError: ``model`` is sparse already, or ``infer`` is something else.
        TypeError: ``model`` is no bare transformers model.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from sparsepeft.spt import SptConfig, save_sparse, sparsify
        >>> config = SptConfig(top_l=8, num_blocks=4)
        >>> model = sparsify(AutoModelForCausalLM.from_pretrained("MODEL"), config, torch.randint(5, 90, (2, 32)))
        >>> file = save_sparse(model, "out/sparse")
        >>> again = load_sparse(AutoModelForCausalLM.from_pretrained("MODEL"), "out/sparse")
    """
    check_bare("load_sparse", model)
    if infer is not None:
        check_choice("infer", infer, INFER)
    if sparsification(model) is not None:
        raise ValueError("The model is sparse already; load the adapter into a dense model.")
    bare = _read(Path(adapter) / (kwargs.get("subfolder") or ""))
    saved = bare or _adapter_tensors(adapter, kwargs)
    if _SETTINGS not in saved:
        raise UserError(f"{adapter} was not trained on a sparse model; load it with PeftModel.from_pretrained.")
    config = read_settings(saved[_SETTINGS])
    codebooks = {name.removesuffix(_CODEBOOKS): each for name, each in saved.items() if name.endswith(_CODEBOOKS)}
    feed_forwards: list[tuple[FeedForward, InitialRouter | None]] = []
    for feed_forward in find_feed_forwards(model, config.layers_to_transform) if config.ffn else []:
        own = config.of(feed_forward.name)
        if own is None:
            continue
        if own.values == "exact":
            feed_forwards.append((feed_forward, None))
            continue
        router = f"{feed_forward.routed_name}.spt_router."
        tensors = {key.removeprefix(router): tensor for key, tensor in saved.items() if key.startswith(router)}
        try:
            start = InitialRouter.of(tensors)
        except KeyError as error:
            raise UserError(
                f"{adapter} has no {router}{error.args[0]}, so it does not belong to this model; pass its own backbone."
            ) from error
        sizes = start.weight.shape[1], len(start.neuron_order)
        if sizes != feed_forward.sizes:
            raise UserError(
                f"{adapter} was trained on FFNs of hidden and inner size {sizes}, but {feed_forward.name} has "
                f"{feed_forward.sizes}; pass the backbone that it was trained on."
            )
        feed_forwards.append((feed_forward, start.to(weight_of(feed_forward.part(feed_forward.names.up)).device)))
    modules = dict(model.named_modules())
    if missing := sorted(codebooks.keys() - modules.keys()):
        raise UserError(f"{adapter} has codebooks for {missing[0]}, which this model lacks; pass its own backbone.")
    books = {name: Codebooks(each, saved.get(f"{name}{_WEIGHTS}")).to(model.device) for name, each in codebooks.items()}
    state = install(model, config, books, feed_forwards, saved[_SETTINGS])
    state.context.infer = infer or config.infer
    return model if bare else PeftModel.from_pretrained(model, str(adapter), **kwargs)


def _read(folder: Path) -> dict[str, Tensor]:
    """What a folder holds of a sparse model without an adapter; nothing if it is no such folder."""
    file = folder / SPARSE_WEIGHTS
    try:
        return load_file(file) if file.is_file() else added_tensors(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} could not be read ({error}); convert the model again.") from error


def _adapter_tensors(adapter: str | Path, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What an adapter's file holds, by name in the backbone; ``kwargs`` may say where on the hub it is."""
    where = {name: value for name, value in kwargs.items() if name in inspect.signature(hf_hub_download).parameters}
    try:
        tensors = load_peft_weights(str(adapter), device="cpu", **where)
    except (OSError, ValueError, SafetensorError) as error:  # the hub's errors are among these
        raise UserError(
            f"The adapter {adapter} could not be loaded ({first_line(error)}); pass the folder of an adapter or of "
            "what save_sparse wrote, or an id on the hub."
        ) from error
    # Names begin with the way from PEFT's model to the backbone, which is shorter with prompt tuning and its like.
    prefix = next((key.removesuffix(_SETTINGS) for key in tensors if key.endswith(_SETTINGS)), "")
    return {plain_name(key.removeprefix(prefix)): tensor for key, tensor in tensors.items()}
