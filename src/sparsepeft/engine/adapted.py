"""One method's view of the backbone: modules of its own, weights shared with all other views."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from sparsepeft.engine.onednn import use_onednn
from sparsepeft.training.methods import loading_adapter
from sparsepeft.tuners._blocks import find_blocks
from sparsepeft.tuners._context import ForwardContext
from sparsepeft.tuners._layer import TaskTunerLayer
from sparsepeft.tuners._partial import PartialPasses


class AdaptedBackbone:
    """The backbone with the adapters of one PEFT method.

    PEFT keeps adapters of one method in one model. Methods must not nest in one tree of modules (a bottleneck adapter
    acts inside a norm that a SPARTAN task may replace), so each method gets a tree; the backbone's tensors exist once.

    Args:
        backbone: whose parameters and buffers are shared. It is not changed.
        onednn: compute its linear layers by oneDNN.
    """

    def __init__(self, backbone: PreTrainedModel, *, onednn: bool) -> None:
        self.model = sharing_tensors(backbone)
        self.model.config.use_cache = False
        if onednn:
            use_onednn(self.model)
        self._partial = PartialPasses(self.model)
        self._peft: PeftModel | None = None
        self._context = ForwardContext()

    @property
    def is_empty(self) -> bool:
        """Whether no adapter is left."""
        return self._peft is None or not self._peft.peft_config

    def load(self, folder: Path, adapter_name: str) -> None:
        """Read an adapter. Passes that run meanwhile are not disturbed, as none of them uses it.

        Raises:
            UserError: the files are damaged, or belong to another backbone; nothing is left of them.
        """
        try:
            with loading_adapter(folder):
                if self._peft is None:
                    peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=adapter_name)
                    self._context = _context_of(peft)
                    self._peft = peft
                else:
                    self._peft.load_adapter(str(folder), adapter_name=adapter_name)
        except BaseException:
            self.delete(adapter_name)
            raise
        assert self._peft is not None
        self._peft.eval()
        tuner: Any = self._peft.base_model
        tuner.set_adapter([], inference_mode=True)  # none is active: only rows that name one use it

    def delete(self, adapter_name: str) -> None:
        """Forget an adapter that no pass uses."""
        if self._peft is not None and adapter_name in self._peft.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the active adapter goes, where loading failed
                self._peft.delete_adapter(adapter_name)

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

    def lowest_layer(self, adapter_name: str) -> int:
        """How many layers at the bottom compute the same with this adapter as without it."""
        blocks = find_blocks(self.model)
        assert self._peft is not None
        config: Any = self._peft.peft_config[adapter_name]
        head = tuple(f"{name}." for name in config.head_modules or ())
        lowest = len(blocks)
        for name, module in self.model.named_modules():
            if not _holds(module, adapter_name) or f"{name}.".startswith(head):
                continue
            inside = (i for i, block in enumerate(blocks) if f"{name}.".startswith(f"{block.name}."))
            lowest = min(lowest, next(inside, 0))  # below the layers, such as the embeddings' norm: none is shared
        return lowest


def sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules, with the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _holds(module: nn.Module, adapter_name: str) -> bool:
    if not isinstance(module, (TaskTunerLayer, AuxiliaryTrainingWrapper)):
        return False
    return any(adapter_name in getattr(module, container) for container in module.adapter_layer_names)


def _context_of(peft: PeftModel) -> ForwardContext:
    tuner: Any = peft.base_model
    context: ForwardContext = tuner._context
    return context
