"""One method's view of the backbone: modules of its own, weights shared with all other views."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from sparsepeft.inference.onednn import use_onednn
from sparsepeft.methods.models import loading_adapter
from sparsepeft.models.adapters import AdapterDict
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.context import ForwardContext
from sparsepeft.models.partial import PartialPasses
from sparsepeft.tuners.layer import TaskTunerLayer

Place = TaskTunerLayer | AuxiliaryTrainingWrapper  # a layer; a module of the head, a norm, a router


class AdaptedBackbone:
    """The backbone with the adapters of one PEFT method.

    PEFT keeps adapters of one method in one model. Methods must not nest in one tree of modules (a bottleneck adapter
    acts inside a norm that a SPARTAN task may replace), so each method gets a tree; the backbone's tensors exist once.
    An adapter that is loaded is set aside from PEFT, which walks over all it knows of whenever one is added.

    Args:
        backbone: whose parameters and buffers are shared. It is not changed.
        onednn: compute its linear layers by oneDNN.
    """

    def __init__(self, backbone: PreTrainedModel, *, onednn: bool) -> None:
        self.model = sharing_tensors(backbone)
        self.model.eval().config.use_cache = False
        # Accelerate's hooks stay as they are; where the model says that it has some, PEFT would set up its own.
        vars(self.model).pop("hf_device_map", None)
        if onednn:
            use_onednn(self.model)
        self._partial = PartialPasses(self.model)
        self._peft: PeftModel | None = None
        self._context = ForwardContext()
        self._places: dict[str, list[Place]] = {}  # of each adapter

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
        """Forget an adapter that no pass uses."""
        for place in self._places.pop(adapter_name):
            if isinstance(place, TaskTunerLayer):
                place.delete_adapter(adapter_name)
            else:
                place.delete_adapter(adapter_name, None)

    def logits(
        self,
        inputs: dict[str, torch.Tensor],
        adapter_names: list[str],
        begin: int = 0,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the rows of a batch, each with its adapter: (B, most labels), -inf where a row's task has fewer.

        With ``states`` (B, T, D), what comes out of the first ``begin`` layers, these are not run.
        """
        given = self._partial.beginning_after(begin - 1, states) if states is not None else nullcontext()
        model: Any = self.model
        with self._context.routed(adapter_names), given:
            logits: torch.Tensor = model(**inputs).logits
        return logits

    @property
    def num_shareable_layers(self) -> int:
        """Layers that can be run once for several tasks; 0 where the model has no single stack of them."""
        return self._partial.num_layers

    def lower_states(self, inputs: dict[str, torch.Tensor], num_layers: int) -> torch.Tensor | None:
        """What comes out of the first ``num_layers`` layers, without any adapter; None if it is more than states."""
        model: Any = self.model
        with self._partial.ending_after(num_layers - 1):
            model(**inputs)
        return self._partial.states()

    def _attach(self, folder: Path, adapter_name: str) -> None:
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=adapter_name)
            self._context = _context_of(self._peft)
        else:
            self._peft.load_adapter(str(folder), adapter_name=adapter_name)
        self._peft.eval()
        tuner: Any = self._peft.base_model
        tuner.set_adapter([], inference_mode=True)  # none is active: only rows that name one use it

    def _lowest_layer(self, adapter_name: str) -> int:
        blocks = find_blocks(self.model)
        assert self._peft is not None
        config: Any = self._peft.peft_config[adapter_name]
        head = tuple(f"{name}." for name in config.head_modules or ())
        lowest = len(blocks)
        for name, _ in self._holding(adapter_name):
            if f"{name}.".startswith(head):
                continue
            inside = (i for i, block in enumerate(blocks) if f"{name}.".startswith(f"{block.name}."))
            lowest = min(lowest, next(inside, 0))  # below the layers, such as the embeddings' norm: none is shared
        return lowest

    def _set_aside(self, adapter_name: str) -> None:
        """Hide an adapter from PEFT."""
        self._places[adapter_name] = [place for _, place in self._holding(adapter_name)]
        for place in self._places[adapter_name]:
            for container in place.adapter_layer_names:
                adapters: AdapterDict = getattr(place, container)
                if adapter_name in adapters:
                    adapters.set_aside(adapter_name)
        if self._peft is not None:
            self._peft.peft_config.pop(adapter_name, None)

    def _holding(self, adapter_name: str) -> list[tuple[str, Place]]:
        """What has something of an adapter, by name."""
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, Place)
            and any(adapter_name in getattr(module, container) for container in module.adapter_layer_names)
        ]


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


def _context_of(peft: PeftModel) -> ForwardContext:
    tuner: Any = peft.base_model
    context: ForwardContext = tuner._context
    return context
