"""Finding a model's head: the modules between its last block and its labels."""

from __future__ import annotations

from dataclasses import dataclass

from peft.utils import ModulesToSaveWrapper
from torch import nn

from sparsepeft.models.blocks import Block, unwrap
from sparsepeft.models.heads import HeadModule
from sparsepeft.models.identity import checkpoint_names, is_loaded, without_prefix


@dataclass(frozen=True)
class HeadSpec:
    """Where a model's head is.

    Attributes:
        modules: names of the head's modules, in the order they run.
        output: the one of them that yields the logits, or None if no layer has ``num_labels`` outputs.
        linear: the name, inside ``output``, of the linear layer with ``num_labels`` outputs; "" if ``output`` is that
            layer.
    """

    modules: tuple[str, ...]
    output: str | None
    linear: str


def find_head(model: nn.Module, blocks: list[Block], names: list[str] | None = None) -> HeadSpec:
    """The modules that follow the last block and are the task's rather than the backbone's.

    These are the model class's own head (all that stands beside the backbone) and whatever else follows the blocks but
    was not in the checkpoint. A language model has none: what maps its states to tokens belongs to the backbone, also
    where its rows are fresh (``resize_token_embeddings``).

    Args:
        model: a transformers model, adapted or not.
        blocks: its Transformer layers.
        names: the head's modules, if they are known (a saved adapter) or chosen by the user.
    """
    following = _following(model, blocks)
    if names is not None:
        modules = [name for name in names if name in dict(model.named_modules())]
        if len(modules) < len(names):
            missing = sorted(set(names) - set(modules))
            raise ValueError(
                f"head_modules names {missing}, which {type(model).__name__} does not have; after its last layer come "
                f"{sorted(following)}. Load the model class the adapter was made for."
            )
    elif is_language_model(model):
        modules = []
    else:
        at_root = _has_task_head(model, following)
        fresh = _fresh(model, following, blocks)
        modules = [name for name in following if (at_root and "." not in name) or name in fresh]
    output, linear = _find_output(model, modules)
    return HeadSpec(tuple(modules), output, linear)


def unmarked_modules(model: nn.Module, blocks: list[Block]) -> list[str]:
    """The backbone's modules after its last block, if no parameter says whether a checkpoint had it; else none."""
    if any(is_loaded(p) for p in model.parameters()):
        return []
    whole = getattr(model, "base_model", model) is model
    return [name for name in _following(model, blocks) if whole or without_prefix(model, name) != name]


def is_language_model(model: nn.Module) -> bool:
    """Whether the model ends in scores of tokens: causal, masked and sequence-to-sequence language models."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def original(module: nn.Module) -> nn.Module:
    """The backbone's own module behind a head's wrapper, ours or PEFT's; any other as it is."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _following(model: nn.Module, blocks: list[Block]) -> dict[str, nn.Module]:
    """Modules with parameters that follow the one that holds the last block, innermost level first.

    Inside the backbone these are registered after it; beside the backbone the order says nothing (XLM-RoBERTa's head is
    registered before it).
    """
    path = blocks[-1].name.split(".")
    beside_backbone = getattr(model, "base_model", model) is not model
    following: dict[str, nn.Module] = {}
    for depth in range(len(path) - 1, -1, -1):
        prefix = ".".join(path[:depth])
        parent = unwrap(model.get_submodule(prefix))
        if isinstance(parent, nn.ModuleList):
            continue
        children = [name for name, _ in parent.named_children()]
        first = 0 if depth == 0 and beside_backbone else children.index(path[depth]) + 1
        for name in children[first:]:
            module = original(parent.get_submodule(name))
            full_name = f"{prefix}.{name}" if prefix else name
            holds_block = any(block.name.startswith(f"{full_name}.") for block in blocks)
            if not holds_block and any(True for _ in module.parameters()):
                following[full_name] = module
    return following


def _fresh(model: nn.Module, following: dict[str, nn.Module], blocks: list[Block]) -> set[str]:
    """Which of the modules were not in the model's checkpoint; none if it has none."""
    if any(is_loaded(p) for p in model.parameters()):
        return {
            name
            for name, module in following.items()
            if not any(is_loaded(p) or p.device.type == "meta" for p in module.parameters())
        }
    # A model without marks has no checkpoint, or is a deep copy. Where not even the blocks are in its file,
    # transformers has renamed the tensors on reading, and the file says nothing.
    saved = checkpoint_names(model)

    def is_saved(name: str) -> bool:
        return any(key.startswith(f"{without_prefix(model, name)}.") for key in saved)

    return {name for name in following if not is_saved(name)} if all(is_saved(b.name) for b in blocks) else set()


def _has_task_head(model: nn.Module, following: dict[str, nn.Module]) -> bool:
    """Whether what follows at the root is a task's head: not in a bare encoder."""
    if getattr(model, "base_model", model) is not model:
        return True
    at_root = [name for name in following if "." not in name]
    return _find_output(model, at_root)[0] is not None


def _find_output(model: nn.Module, modules: list[str]) -> tuple[str | None, str]:
    """The last linear layer with ``num_labels`` outputs, as (head module, name inside it)."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    context = next((m.context for m in model.modules() if isinstance(m, HeadModule)), None)
    if context is not None and context.labels is not None:  # the config has the active adapter's count
        num_labels = context.labels.original.num_labels
    for name in reversed(modules):
        for inner, module in reversed(list(original(model.get_submodule(name)).named_modules())):
            if isinstance(module, nn.Linear) and module.out_features == num_labels:
                return name, inner
    return None, ""
