"""Where the memory of a whole fine-tuning step of a language model goes, and what each part of it can be made to take.

    sparsepeft benchmark step_memory --model MODEL --output step_memory.json

LoRA, one sequence of random tokens, AdamW. Memory is that of tensors, exact, in three phases of a step: the layers'
forward pass, at whose end is what they keep for backward; the head and the loss, until the hidden states' gradient is
there; the layers' backward pass. Weights, and adapter with optimizer state, are there besides.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import record_function

from sparsepeft.backbones import describe_backbone
from sparsepeft.errors import UserError
from sparsepeft.methods.language_models import load_language_model
from sparsepeft.models import deferred_logits
from sparsepeft.spt import SptConfig, sparsify
from sparsepeft_research.benchmarks.measuring import memory_by_phase
from sparsepeft_research.benchmarks.registry import Progress

BASELINE = "transformers"
FORWARD, LOSS, BACKWARD = "forward", "loss", "backward"
_RANK, _CALIBRATION_TOKENS = 16, 1024
_ATTENTION, _QUARTER = {"ffn": False}, {"values": "exact", "num_active_blocks": 0.25}


class Candidate(NamedTuple):
    """A way to take a step.

    Attributes:
        is_chunked: the loss is taken in chunks of the logits.
        spt: fields of an SptConfig; None leaves the model dense.
        is_checkpointed: activations of the layers are computed again in backward.
    """

    is_chunked: bool = True
    spt: dict[str, Any] | None = None
    is_checkpointed: bool = False


CANDIDATES = {
    BASELINE: Candidate(is_chunked=False),
    "transformers, checkpointing": Candidate(is_chunked=False, is_checkpointed=True),
    "loss in chunks": Candidate(),
    "loss in chunks, sparse attention": Candidate(spt=_ATTENTION),
    "loss in chunks, exact FFN at a quarter": Candidate(spt=_QUARTER | {"attention": False}),
    "loss in chunks, both": Candidate(spt=_QUARTER),
    "loss in chunks, checkpointing": Candidate(is_checkpointed=True),
    "loss in chunks, both, checkpointing": Candidate(spt=_QUARTER, is_checkpointed=True),
}


def run(*, model: str, length: int, dtypes: str, only: str, seed: int, progress: Progress) -> dict[str, Any]:
    """Measure a step of every candidate, with weights in each dtype.

    Raises:
        UserError: there is no such causal language model, or it cannot be made sparse.
    """
    if not model:
        raise UserError("`model` was left out; pass a causal language model: a hub id or a folder.")
    results = []
    for dtype in dtypes.split(","):
        for name, candidate in CANDIDATES.items():
            if only in name:
                progress(f"{dtype}: {name}")
                results.append({"dtype": dtype, "candidate": name, **measure(model, length, dtype, candidate, seed)})
                gc.collect()
    for one in results:
        same = (o for o in results if (o["dtype"], o["candidate"]) == (one["dtype"], BASELINE))
        one["share_of_transformers"] = next((one["peak_bytes"] / other["peak_bytes"] for other in same), None)
    about = {"model": describe_backbone(model), "layers_of_lora": "queries and values", "rank": _RANK, "batch_size": 1}
    return {"results": results, "settings": about}


def measure(folder: str, length: int, dtype: str, candidate: Candidate, seed: int) -> dict[str, Any]:
    """Bytes of each part of a step, and the most that is there at one time."""
    torch.manual_seed(seed)
    base, _ = load_language_model(folder, dtype=getattr(torch, dtype))
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, length))
    weights = _bytes([*base.parameters(), *base.buffers()])
    if candidate.spt is not None:
        try:
            sparsify(base, SptConfig(**candidate.spt), ids[:, :_CALIBRATION_TOKENS])
        except ValueError as error:
            raise UserError(f"{folder} cannot be measured: {error}") from error
    model = get_peft_model(base, LoraConfig(r=_RANK, lora_alpha=2 * _RANK, task_type="CAUSAL_LM")).train()
    if candidate.is_checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    _note_phases(base.get_output_embeddings())

    def step(tokens: Tensor) -> None:
        with record_function(FORWARD):
            pass
        with deferred_logits(model) if candidate.is_chunked else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(ids[:, :16])  # the optimizer's state is made
    states = [value for state in optimizer.state.values() for value in state.values()]
    everything = _bytes([*model.parameters(), *model.buffers()]) + _bytes(states)
    phases = memory_by_phase(lambda: step(ids), (FORWARD, LOSS, BACKWARD))
    kept = phases[LOSS].start_bytes
    return {
        "weights_bytes": weights,
        "adapter_and_optimizer_bytes": everything - weights,
        "kept_activations_bytes": kept,
        "loss_bytes": phases[LOSS].peak_bytes - kept,
        "phases": {name: phase._asdict() for name, phase in phases.items()},
        "step_bytes": max(phase.peak_bytes for phase in phases.values()),
        "peak_bytes": everything + max(phase.peak_bytes for phase in phases.values()),
    }


def _note_phases(head: nn.Module) -> None:
    """From now on, note when the head begins, and when the gradient of what it reads is there."""

    def begin(module: nn.Module, args: tuple[Tensor]) -> None:
        with record_function(LOSS):
            pass
        args[0].register_hook(end)

    def end(gradient: Tensor) -> None:
        with record_function(BACKWARD):
            pass

    head.register_forward_pre_hook(begin)


def _bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
