"""Embeddings that belong to an adapter's file: those of a vocabulary that was changed after loading.

PEFT saves them with the adapter (``save_embedding_layers="auto"``), for any method, and loads them into the model,
which must have been resized before.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def embedding_layers(model: nn.Module) -> list[str]:
    """Names of the modules that hold a transformers model's input embeddings and the scores of its tokens."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter, lambda: None)())
        except NotImplementedError:  # models of several parts, such as CLIP
            continue
    return [name for name, module in model.named_modules() if any(module is layer for layer in found)]


def resized_embeddings(model: nn.Module) -> list[str]:
    """:func:`embedding_layers`, if the vocabulary is another than the checkpoint's; else none.

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
    return embedding_layers(model) if changed else []
