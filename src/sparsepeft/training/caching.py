"""Training on top of frozen layers whose outputs are computed once per example.

Where the lower layers of a model are frozen (adapters in the upper layers only, or a head alone), their outputs for
an example never change: the few-shot protocol's 1000 steps over 200 examples would compute each of them 80 times. Here
they are computed once, without dropout, and read back from a file while the upper layers train.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsepeft.errors import RunFailed, UserError
from sparsepeft.inference.encoding import Collator
from sparsepeft.models.blocks import Block, find_blocks
from sparsepeft.models.modes import in_mode
from sparsepeft.models.partial import PartialPasses

if TYPE_CHECKING:
    from datasets import Dataset

STATES, INDEX = "cached_states", "cache_index"


class FrozenLayerCache:
    """The outputs of a model's frozen lower layers for a dataset.

    Args:
        model: whose lowest layers (and embeddings) train nothing.
        file: where the states are kept, (tokens, D) in float32, mapped into memory; about 4 D bytes a token.

    Raises:
        UserError: nothing is frozen at the bottom, or the model's layers hand on more than their hidden states.
    """

    def __init__(self, model: nn.Module, file: Path) -> None:
        self.model, self.file = model, file
        self.blocks = frozen_blocks(model)
        self.width = self.blocks[-1].hidden_size
        self._passes: PartialPasses | None = None
        self._offsets: list[int] = []
        self._states = torch.empty(0)

    @torch.no_grad()
    def fill(self, dataset: Dataset, collator: Collator, batch_size: int = 32, is_filled: bool = False) -> Dataset:
        """Compute the states of every example; the dataset comes back with the column that finds them.

        Args:
            dataset: encoded examples.
            collator: makes batches of them.
            batch_size: of the passes.
            is_filled: another process has just filled the file with these states, which are taken from there.

        Raises:
            UserError: the model's layers hand on more than their hidden states.
            RunFailed: there is no room for the states.
        """
        lengths = [len(ids) for ids in dataset["input_ids"]]
        self._offsets = [0, *itertools.accumulate(lengths)]
        num_values = self._offsets[-1] * self.width
        if not is_filled:
            _reserve(self.file, num_values * torch.float32.itemsize)
        states = torch.from_file(str(self.file), shared=True, size=num_values, dtype=torch.float32)
        self._states = states.view(-1, self.width)
        if not is_filled:
            self._compute(dataset, collator, lengths, batch_size)
        return dataset.add_column(INDEX, list(range(len(dataset))))

    def _compute(self, dataset: Dataset, collator: Collator, lengths: Sequence[int], batch_size: int) -> None:
        # Weights that accelerate offloads are nowhere between passes, and its hooks move the inputs themselves.
        devices = (parameter.device for parameter in self.model.parameters())
        device = next((each for each in devices if each.type != "meta"), torch.device("cpu"))
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        with in_mode(self.model, training=False), self.attached() as passes:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = {key: value.to(device) for key, value in collator([dataset[row] for row in rows]).items()}
                with passes.ending_after(len(self.blocks) - 1):
                    self.model(**{key: value for key, value in batch.items() if key != "labels"})
                states_above = passes.states()
                if states_above is None:
                    raise UserError(
                        f"`cache_frozen_layers` was given, but {type(self.blocks[-1].module).__name__} hands on "
                        "more than its hidden states, which cannot be cached; train this model without."
                    )
                for row, state, mask in zip(rows, states_above, batch["attention_mask"].bool(), strict=True):
                    self._states[self._offsets[row] : self._offsets[row + 1]] = state[mask].float().cpu()

    def pad(self, rows: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
        """The states of some examples where their mask is 1, zeros elsewhere: (B, T, D)."""
        padded = torch.zeros(*attention_mask.shape, self.width)
        padded[attention_mask.bool()] = torch.cat([self._states[self._offsets[r] : self._offsets[r + 1]] for r in rows])
        return padded

    @contextmanager
    def attached(self) -> Iterator[PartialPasses]:
        """While this lasts, the model can be told by :meth:`using` to start above the frozen layers."""
        self._passes = PartialPasses(self.model)
        try:
            yield self._passes
        finally:
            self._passes.remove()
            self._passes = None

    @contextmanager
    def using(self, states: torch.Tensor | None) -> Iterator[None]:
        """Start from ``states`` (B, T, D) in the passes within; with None the frozen layers run as ever."""
        if states is None:
            yield
            return
        assert self._passes is not None
        with self._passes.beginning_after(len(self.blocks) - 1, states):
            yield


def _reserve(file: Path, num_bytes: int) -> None:
    """Give a file its size on the disk: where a mapped one has holes, a full disk ends the process without a word."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.truncate(num_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, num_bytes)
            elif shutil.disk_usage(file.parent).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):
            file.unlink()
        raise RunFailed(
            f"The outputs of the frozen layers need {num_bytes / 1e6:,.1f} MB in {file.parent}, which could not be had "
            f"({error}); free space and repeat the command, or train without `cache_frozen_layers`."
        ) from error


def frozen_blocks(model: nn.Module) -> list[Block]:
    """The lowest layers of ``model``, as many as train nothing and have nothing trained below them.

    Raises:
        UserError: there are none.
    """
    blocks = find_blocks(model)
    if any(block.is_decoder for block in blocks) or len({block.name.rpartition(".")[0] for block in blocks}) > 1:
        raise UserError(
            f"`cache_frozen_layers` was given, but {type(model).__name__} has more than one stack of layers; train it "
            "without."
        )
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    trained = [name for name, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))]
    # The wrapper of an extended layer carries the adapter beside the layer itself.
    layers = [names[id(block.module)].removesuffix(".base_layer") for block in blocks]
    order = list(modules)
    below = [name for name in trained if order.index(name) < order.index(layers[0])]
    frozen = list(
        itertools.takewhile(
            lambda pair: not any(f"{name}.".startswith(f"{pair[1]}.") for name in trained),
            zip(blocks, layers, strict=True),
        )
    )
    if below or not frozen:
        name = (below or layers)[0].removeprefix("base_model.model.").removesuffix(".modules_to_save.default")
        raise UserError(
            f"`cache_frozen_layers` was given, but {name} is trained, so there is nothing "
            "below it to compute once; keep the adapter to upper layers by the setting layers_to_transform=[...]."
        )
    return [block for block, _ in frozen]


class CachingCollator(Collator):
    """Adds to each batch of the training data the states of its examples."""

    def __init__(self, collator: Collator, cache: FrozenLayerCache) -> None:
        super().__init__(collator.tokenizer)
        self.cache = cache

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A list of encoded examples -> tensors (B, T), labels (B,) and, where known, cached states (B, T, D)."""
        rows = [example[INDEX] for example in examples if INDEX in example]
        batch = super().__call__([{k: v for k, v in example.items() if k != INDEX} for example in examples])
        if rows:
            batch[STATES] = self.cache.pad(rows, batch["attention_mask"])
        return batch
