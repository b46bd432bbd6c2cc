"""Heads that label tokens, on a model whose own head is for whole texts."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from sparsepeft.errors import UserError
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.head_search import find_head

TOKEN_HEAD = "token_head"  # what the module is called in the model


@dataclass
class _States(BaseModelOutputWithPastAndCrossAttentions):
    """What a backbone returns; some models for token classification also hand on what theirs alone has."""

    mems = None  # XLNet's


class _StatesGiven(nn.Module):
    """Stands where a model for token classification has its backbone, and returns the states that it is given."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _States:
        """States (B, T, D), as an output of a backbone."""
        return _States(last_hidden_state=inputs_embeds)


class TokenHeads:
    """What transformers' model for token classification does after its backbone, done after another model's.

    The model gets one more module, :data:`TOKEN_HEAD`: the class for token classification without its backbone. An
    adapter's own head stands in there, as that of a text task stands in the model's head; so adapters of both kinds
    share the passes of the backbone.

    Args:
        model: bare, with a head for whole texts. Its backbone's output is noted in a hook.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head_of_texts = find_head(model, find_blocks(model)).modules
        self._names = {name for name, _ in model.named_modules()}  # while no adapter has changed them
        self._targets: list[str] | None = None  # layers to extend where these are not all of the model's
        self._foreign: tuple[str, ...] = ()  # modules that models for token classification lack
        self._noted = threading.local()
        model.base_model.register_forward_hook(self._note)

    def config_of(self, folder: Path) -> tuple[Any, dict[str, str] | None]:
        """An adapter's config, changed to have its head where the model has it, and how its tensors are renamed.

        Raises:
            UserError: the adapter labels tokens, but there is no such model of this architecture.
        """
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.task_type != TaskType.TOKEN_CLS:
            config._foreign_modules = (TOKEN_HEAD,)
            return config, None
        if not hasattr(self._model, TOKEN_HEAD):
            self._add_head()
        config._foreign_modules = self._foreign
        if config.target_modules is None:
            config.target_modules = self._targets
        names = config.head_modules or []
        config.head_modules = [f"{TOKEN_HEAD}.{name}" for name in names]
        return config, {rf"^({'|'.join(map(re.escape, names))})\.": rf"{TOKEN_HEAD}.\1."}

    @contextmanager
    def noting(self, is_wanted: bool) -> Iterator[None]:
        """Inside the context, the states of this thread's next pass are kept for :meth:`logits`, if they are wanted."""
        self._noted.is_wanted = is_wanted
        try:
            yield
        finally:
            self._noted.is_wanted = False

    def attach(self, peft: PeftModel | None, folder: Path, adapter_name: str) -> tuple[PeftModel, bool]:
        """Load an adapter into the model, which is ``peft``'s once it has one; it is not made active.

        Returns:
            PEFT's model, and whether the adapter labels tokens.

        Raises:
            UserError: as :meth:`config_of`.
        """
        config, renamed = self.config_of(folder)
        config.inference_mode = True
        options: dict[str, Any] = {"adapter_name": adapter_name, "key_mapping": renamed}
        if peft is None:
            peft = PeftModel.from_pretrained(self._model, str(folder), config=config, **options)
        else:
            peft.add_adapter(adapter_name, config)
            peft.load_adapter(str(folder), **options)
        # Its labels would stand in the model's config, from which the next one's head may be made.
        tuner: Any = peft.base_model
        tuner.set_adapter([], inference_mode=True)
        return peft, renamed is not None

    def logits(self, rows: list[int] | None = None) -> torch.Tensor:
        """Logits (rows, T, labels) of some rows of the pass before, or all; by which head, the routing says."""
        states, self._noted.states = self._noted.states, None
        states = states if rows is None else states[rows]
        logits: torch.Tensor = self._model.get_submodule(TOKEN_HEAD)(inputs_embeds=states).logits
        return logits

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        if getattr(self._noted, "is_wanted", False):
            self._noted.states = output.last_hidden_state if self._targets is None else output.encoder_last_hidden_state

    def _add_head(self) -> None:
        model = self._model
        head = _skeleton(model)
        config = head.config
        blocks = find_blocks(head)
        if model.config.is_encoder_decoder and not config.is_encoder_decoder:  # T5's reads the encoder alone
            self._targets = [block.name for block in blocks]
        lacking = self._names - {name for name, _ in head.named_modules()}
        outermost = {name for name in lacking if name.rpartition(".")[0] not in lacking}
        self._foreign = tuple(sorted({*outermost, *self._head_of_texts}))
        setattr(head, head.base_model_prefix, _StatesGiven())
        setattr(model, TOKEN_HEAD, _with_zeros(head, model).requires_grad_(False).eval())


def token_model(model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """A model for token classification on the layers of one that has a head for whole texts, which it shares.

    Its own head holds zeros, for an adapter to fill.

    Raises:
        UserError: there is no such model of this architecture.
    """
    made = _skeleton(model, num_labels)
    body, layers = made.base_model, model.base_model
    for name, _ in list(body.named_children()):  # not those of the layers that models for tokens lack, such as a pooler
        setattr(body, name, layers.get_submodule(name))
    for name, _ in list(body.named_parameters(recurse=False)):
        setattr(body, name, layers.get_parameter(name))
    for name, _ in list(body.named_buffers(recurse=False)):
        setattr(body, name, layers.get_buffer(name))
    for (
        module
    ) in layers.modules():  # what is changed in the config later, such as how attention computes, they must see
        if getattr(module, "config", None) is model.config:
            module.config = made.config
    for name, module in made.named_children():
        if name != made.base_model_prefix:
            _with_zeros(module, model)
    made.name_or_path = model.name_or_path
    return made.requires_grad_(False).eval()


def _skeleton(model: PreTrainedModel, num_labels: int | None = None) -> Any:
    """The model for token classification of the same architecture, without weights."""
    config = copy.deepcopy(model.config)  # which some models change
    if num_labels is not None:
        config.num_labels = num_labels
    try:
        with torch.device("meta"):
            return AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise UserError(
            f"The adapter labels tokens, but transformers has no token classification for {config.model_type}; pass a "
            "backbone of another architecture."
        ) from error


def _with_zeros(head: nn.Module, model: PreTrainedModel) -> nn.Module:
    """A module without weights gets some on the model's device, in its dtype; each adapter brings its own values."""
    head.to_empty(device=next(model.parameters()).device).to(model.dtype)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
