"""Two processes beside one: losses of DDP and FSDP2 on a CPU, and the bytes that a step sends.

    python -m sparsepeft_research.experiments.processes [--model MODEL] [--methods spartan ...]

Every method trains for twenty steps in one process, and in two that share each batch, by ``transformers.Trainer`` in
float32 and without dropout, which each process draws for itself. Gradients are counted as DDP sends them; all that
goes between the processes, in both directions, by the loopback interface, which nothing else should use meanwhile. The
result is ``research/results/processes/MODEL.json``, with another rate than the default ``MODEL-lrRATE.json``: Adam
moves a weight by about the rate whatever its gradient, so that sums in another order, by which a gradient near zero
changes its sign, show in proportion to it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.methods.models import extend, load_backbone
from sparsepeft.methods.recipes import get_recipe
from sparsepeft.models.blocks import find_blocks
from sparsepeft.tasks import task_spec
from sparsepeft.training import SparseGradientTrainer
from sparsepeft.training.processes import leave
from sparsepeft_research.results import RESULTS, Result, describe_machine, write_result

STRATEGIES = ("one", "ddp", "fsdp2")
PROCESSES = 2
_RATE = 1e-3
_COUNTED = "sparsepeft_counted"  # an attribute of a model whose gradients are
_LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
_FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@dataclass(frozen=True)
class Job:
    """A training of twenty steps or so.

    Attributes:
        strategy: one of :data:`STRATEGIES`.
        build: makes the model; picklable.
        layer: name of the class that FSDP2 shards layer by layer.
        examples: what it is trained on, in no order of its own: dictionaries of tensors.
        folder: for checkpoints, ``log.json`` and the model saved at the end, in ``saved``.
        counts_tokens: the model divides its loss by the labels in all processes, as language models do.
        resume_from: a checkpoint to go on from.
        arguments: others of ``transformers.TrainingArguments``.
    """

    strategy: str
    build: Callable[[], nn.Module]
    layer: str
    examples: Sequence[dict[str, Tensor]]
    folder: Path
    counts_tokens: bool = False
    resume_from: Path | None = None
    arguments: dict[str, Any] | None = None


def run_jobs(jobs: Sequence[Job], folder: Path) -> None:
    """Do jobs of two processes one after the other; ``folder`` is for the file by which they find each other."""
    torch.multiprocessing.spawn(_process, (str(folder), list(jobs)), nprocs=PROCESSES)


def _process(rank: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    for job in jobs:
        for key in _FSDP:
            os.environ.pop(key, None)
        if job.strategy == "fsdp2":
            os.environ.update(_FSDP, FSDP_TRANSFORMER_CLS_TO_WRAP=job.layer)
        train(job)
        dist.barrier()
    leave()


def train(job: Job) -> None:
    """Do a job in the processes there are: the first one writes."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    values: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 20,
        "learning_rate": _RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        "ddp_find_unused_parameters": False,
        # transformers divides a classifier's loss by the labels of all processes, which the model itself does not do.
        "average_tokens_across_devices": job.counts_tokens,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    } | (job.arguments or {})
    values["per_device_train_batch_size"] //= processes
    arguments = TrainingArguments(str(job.folder), **values)
    if job.strategy == "fsdp2":
        assert arguments.device.type == "cpu"
        # accelerate shards on accelerators alone; this makes it do on the CPU what it does there.
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    model = job.build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = _CountingTrainer(model=model, args=arguments, train_dataset=job.examples)
    before = _loopback()
    trainer.train(resume_from_checkpoint=None if job.resume_from is None else str(job.resume_from))
    sent = _loopback() - before
    trainer.save_model(str(job.folder / "saved"))
    if arguments.process_index == 0:
        steps = trainer.state.global_step
        log = {
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "gradient_bytes_per_step": trainer.gradient_bytes // steps,
            "sent_bytes_per_step": sent // steps,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "parameters": sum(p.numel() for p in model.parameters()),
            "sharded_modules": sum(isinstance(module, FSDPModule) for module in model.modules()),
        }
        (job.folder / "log.json").write_text(json.dumps(log), encoding="utf-8")


class _CountingTrainer(SparseGradientTrainer):
    """Counts the bytes of gradients that DDP sends."""

    gradient_bytes = 0

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.parallel.DistributedDataParallel) and not hasattr(model, _COUNTED):
            setattr(model, _COUNTED, True)
            model.register_comm_hook(None, self._send)
        return super().training_step(model, *args, **kwargs)

    def _send(self, group, bucket):  # type: ignore[no-untyped-def]  # DDP wants the types, where these are names
        self.gradient_bytes += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)


def _loopback() -> int:
    """Bytes that went over it so far."""
    return int(_LOOPBACK.read_text()) if _LOOPBACK.exists() else 0


def _build(model: str, method: str) -> nn.Module:
    spec = task_spec("sst2")
    torch.manual_seed(0)
    return extend(load_backbone(model, spec), method, spec, get_recipe("best", method).adapter)


def main() -> None:
    """Measure, compare with one process, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder; MiniLM by default")
    parser.add_argument("--methods", nargs="+", default=["spartan", "pfeiffer", "lora", "full"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of an example, drawn at random")
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=_RATE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = describe_machine(seed=0)
    model = resolve_model(options.model)
    layer = type(find_blocks(load_backbone(model, task_spec("sst2")))[0].module).__name__
    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "input_ids": torch.randint(1000, 20000, (options.length,), generator=generator),
            "labels": torch.randint(0, 2, (), generator=generator),
        }
        for _ in range(options.batch_size * options.max_steps)
    ]
    arguments = {
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        jobs = {
            (method, strategy): Job(
                strategy,
                partial(_build, model, method),
                layer,
                examples,
                Path(root, method, strategy),
                arguments=arguments,
            )
            for method in options.methods
            for strategy in STRATEGIES
        }
        for job in jobs.values():
            job.folder.mkdir(parents=True)
        run_jobs([job for job in jobs.values() if job.strategy != "one"], Path(root))
        for job in jobs.values():
            if job.strategy == "one":
                train(job)
        logs = {key: json.loads((job.folder / "log.json").read_text()) for key, job in jobs.items()}
    for method in options.methods:
        one = logs[method, "one"]
        results[method] = {name: one[name] for name in ("parameters", "trained_parameters", "losses")}
        for strategy in STRATEGIES[1:]:
            log = logs[method, strategy]
            results[method][strategy] = {
                "largest_difference_of_losses": max(map(_distance, one["losses"], log["losses"])),
                "gradient_bytes_per_step": log["gradient_bytes_per_step"] or None,
                "sent_bytes_per_step": log["sent_bytes_per_step"],
            }
    settings = vars(options) | {"model": describe_backbone(model), "processes": PROCESSES, "dtype": "float32"}
    name = Path(options.model).name if options.model else "all-MiniLM-L6-v2"
    name += "" if options.learning_rate == _RATE else f"-lr{options.learning_rate:g}"
    result = Result("processes", settings, results, environment, seed=0)
    write_result(RESULTS / "processes" / f"{name}.json", result)


def _distance(left: float, right: float) -> float:
    return abs(left - right)


if __name__ == "__main__":
    main()
