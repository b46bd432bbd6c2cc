"""Views of the backbone: models that share its weights, each for the tasks that can be batched together.

A :class:`SharedView` answers the tasks of one PEFT method, row by row; a plain :class:`View` answers one task alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from sparsepeft.methods.models import loading_adapter
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.head_search import HeadSpec
from sparsepeft.models.onednn import use_onednn
from sparsepeft.models.partial import PartialPasses
from sparsepeft.models.sublayers import find_feed_forwards
from sparsepeft.models.token_heads import TokenHeads
from sparsepeft.spt.config import SptConfig
from sparsepeft.tuners.head_copies import copy_with_labels
from sparsepeft.tuners.layer import TaskTunerLayer, execution_device

AdapterSite = TaskTunerLayer | AuxiliaryTrainingWrapper  # a layer; a module of the head, a norm, a router


class Logits(NamedTuple):
    """What a pass of B rows gives, -inf where a row's task has fewer labels than others.

    Attributes:
        of_texts: (B, most labels); rows whose tokens are labelled say nothing here.
        of_tokens: (N, T, most labels) of the N rows whose tokens are labelled, in order; None if there are none.
    """

    of_texts: torch.Tensor
    of_tokens: torch.Tensor | None = None


class View:
    """A model that answers one task alone: its adapter cannot be routed row by row, or all of it was trained.

    Args:
        model: dense or sparse, with its adapter if it has one.
        device: where its inputs are expected; None is where the model is when it is asked.
        labels_tokens: the model is one for token classification.
    """

    is_shared = False  # among tasks, which may have other numbers of labels

    def __init__(
        self, model: torch.nn.Module, device: torch.device | None = None, *, labels_tokens: bool = False
    ) -> None:
        self.model: Any = model.eval()
        self._device, self._is_of_tokens = device, labels_tokens

    @property
    def device(self) -> torch.device:
        """Where its inputs are expected."""
        return self._device or self.model.device

    @property
    def num_shareable_layers(self) -> int:
        """Layers that can be run once for several tasks; 0 where the model has no single stack of them."""
        return 0

    def logits(
        self,
        inputs: dict[str, torch.Tensor],
        adapter_names: list[str],
        begin: int = 0,
        states: torch.Tensor | None = None,
    ) -> Logits:
        """Run the rows of a batch, each with its adapter.

        With ``states`` (B, T, D), what comes out of the first ``begin`` layers, these are not run.
        """
        logits = self.model(**inputs).logits
        return Logits(logits[:, 0], logits) if self._is_of_tokens else Logits(logits)

    def lower_states(self, inputs: dict[str, torch.Tensor], num_layers: int) -> torch.Tensor | None:
        """What comes out of the first ``num_layers`` layers, without any adapter; None if it is more than states."""
        return None

    def delete(self, adapter_name: str) -> None:
        """Forget an adapter that no pass uses."""


class SharedView(View):
    """The backbone with the adapters of one PEFT method.

    PEFT keeps adapters of one method in one model. Methods must not nest in one tree of modules (a bottleneck adapter
    acts inside a norm that a SPARTAN task may replace), so each method gets a tree; the backbone's tensors exist once.
    An adapter that is loaded is set aside from PEFT, which walks over all it knows of whenever one is added.

    Args:
        backbone: whose parameters and buffers are shared. It is not changed.
        onednn: compute its linear layers by oneDNN.
    """

    is_shared = True

    def __init__(self, backbone: PreTrainedModel, *, onednn: bool) -> None:
        super().__init__(serving_copy(backbone), execution_device(backbone) or backbone.device)
        if onednn:
            use_onednn(self.model)
        self._partial = PartialPasses(self.model)
        self._token_heads = TokenHeads(self.model)
        self._peft: Any = None  # a PeftModel once an adapter was loaded
        self._context = ForwardContext()
        self._sites: dict[str, list[AdapterSite]] = {}  # of each adapter
        self._labels_tokens: set[str] = set()  # adapters that do

    def load(self, folder: Path, adapter_name: str) -> int:
        """Read an adapter. Passes that run meanwhile are not disturbed, as none of them uses it.

        Returns:
            How many layers at the bottom compute the same with this adapter as without it.

        Raises:
            UserError: the files are damaged, or belong to another backbone; nothing is left of them.
        """
        try:
            with loading_adapter(folder):
                self._attach(folder, adapter_name)
            lowest = self._lowest_layer(adapter_name)
        except BaseException:
            self._set_aside(adapter_name)
            self.delete(adapter_name)
            raise
        self._set_aside(adapter_name)
        return lowest

    def delete(self, adapter_name: str) -> None:
        """As in any view."""
        self._labels_tokens.discard(adapter_name)
        for site in self._sites.pop(adapter_name):
            site.delete_adapter(adapter_name, *(() if isinstance(site, TaskTunerLayer) else (None,)))

    def logits(
        self,
        inputs: dict[str, torch.Tensor],
        adapter_names: list[str],
        begin: int = 0,
        states: torch.Tensor | None = None,
    ) -> Logits:
        """As in any view."""
        rows = [row for row, name in enumerate(adapter_names) if name in self._labels_tokens]
        skipping = self._partial.beginning_after(begin - 1, states) if states is not None else nullcontext()
        with self._context.routed(adapter_names), skipping, self._token_heads.noting(bool(rows)):
            of_texts = self.model(**inputs).logits
        if not rows:
            return Logits(of_texts)
        with self._context.routed([adapter_names[row] for row in rows]):
            return Logits(of_texts, self._token_heads.logits(rows))

    @property
    def num_shareable_layers(self) -> int:
        """As in any view."""
        return self._partial.num_layers

    def lower_states(self, inputs: dict[str, torch.Tensor], num_layers: int) -> torch.Tensor | None:
        """As in any view."""
        with self._partial.ending_after(num_layers - 1):
            self.model(**inputs)
        return self._partial.states()

    def _attach(self, folder: Path, adapter_name: str) -> None:
        is_first = self._peft is None
        self._peft, labels_tokens = self._token_heads.attach(self._peft, folder, adapter_name)
        if is_first:
            self._context = self._peft.base_model._context
        if labels_tokens:
            self._labels_tokens.add(adapter_name)
        self._peft.eval()

    def _lowest_layer(self, adapter_name: str) -> int:
        blocks = find_blocks(self.model)
        config = self._peft.peft_config[adapter_name]
        head = tuple(f"{name}." for name in config.head_modules or ())
        lowest = len(blocks)
        for name, _ in self._sites_of(adapter_name):
            if f"{name}.".startswith(head):
                continue
            inside = (i for i, block in enumerate(blocks) if f"{name}.".startswith(f"{block.name}."))
            lowest = min(lowest, next(inside, 0))  # below the layers, such as the embeddings' norm: none is shared
        return lowest

    def _set_aside(self, adapter_name: str) -> None:
        """Hide an adapter from PEFT."""
        self._sites[adapter_name] = [site for _, site in self._sites_of(adapter_name)]
        for site in self._sites[adapter_name]:
            for container in site.adapter_layer_names:
                adapters: AdapterDict = getattr(site, container)
                if adapter_name in adapters:
                    adapters.set_aside(adapter_name)
        if self._peft is not None:
            self._peft.peft_config.pop(adapter_name, None)

    def _sites_of(self, adapter_name: str) -> list[tuple[str, AdapterSite]]:
        """The modules that hold a part of an adapter, by name."""
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, AdapterSite)
            and any(adapter_name in getattr(module, container) for container in module.adapter_layer_names)
        ]


def serving_copy(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of the backbone's modules that shares its tensors, set up to answer."""
    copied = sharing_tensors(backbone)
    copied.eval().config.update({"use_cache": False, "return_dict": True})
    # Accelerate's hooks stay as they are; where the model says that it has some, PEFT would set up its own.
    vars(copied).pop("hf_device_map", None)
    return copied


def with_own_head(model: PreTrainedModel, head: HeadSpec, num_labels: int) -> None:
    """Give a model from :func:`serving_copy` an output layer of ``num_labels``, for an adapter to fill."""
    if head.output is not None:
        output = copy_with_labels(model.get_submodule(head.output), head.linear, num_labels, initializer_range=0.02)
        model.set_submodule(head.output, output)


def with_own_feed_forwards(model: PreTrainedModel, spt: SptConfig) -> None:
    """Give a model from :func:`serving_copy` weights of its own where routing puts neurons into another order."""
    for feed_forward in find_feed_forwards(model, spt.layers_to_transform) if spt.ffn else []:
        for name in feed_forward.projection_names:
            for parameter in feed_forward.part(name).parameters():
                parameter.data = parameter.data.clone()


def sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules whose parameters and buffers lie in the same memory.

    What is done to the copy (its mode, device, hooks, which parameters want gradients) leaves ``model`` alone. Values
    that are changed in place, as optimizers change them, change in both.
    """
    # A shallow copy of a tensor shares its memory, whatever its class, and keeps what was noted on it.
    memo: dict[int, Any] = {id(tensor): copy.copy(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for offloaded in _offloaded_weights(model):
        memo[id(offloaded)] = offloaded
    return copy.deepcopy(model, memo)


def _offloaded_weights(model: PreTrainedModel) -> Iterator[Any]:
    """Where accelerate's hooks keep weights that are not on the device they compute on."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            for name in ("weights_map", "tied_params_map"):
                if getattr(each, name, None) is not None:
                    yield getattr(each, name)
