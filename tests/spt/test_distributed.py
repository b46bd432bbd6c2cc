"""Sparse models in data-parallel training: two processes are as good as one with all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tests.spt.models import TARGETS, inputs, sparse
from torch.nn.parallel import DistributedDataParallel

from sparsepeft.spt import sparsification
from sparsepeft.training.processes import leave

PROCESSES, ROWS = 2, 4


def sparse_with_lora(dense_steps: int) -> Any:
    # Balance is judged over the tokens of a process, so its loss is the one thing that differs between the two ways.
    model = sparse("llama", top_l=6, load_balancing_coef=0.0, codebook_interval=1, dense_steps=dense_steps)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=TARGETS["llama"], r=3, init_lora_weights=False))
    return model.double().train()


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model(input_ids=ids, labels=ids).loss.backward()
    bare = getattr(model, "module", model)
    return {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}


def codebooks(model: Any) -> list[torch.Tensor]:
    return [layer.state.current.codebooks.clone() for layer in sparsification(model).attention.values()]


def train(rank: int, folder: str, dense_steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        model = sparse_with_lora(dense_steps)
        parallel = DistributedDataParallel(model)
        ids = inputs("llama", padding=None, batch=ROWS)["input_ids"].chunk(PROCESSES)[rank]
        first = gradients(parallel, ids)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        start = codebooks(model)
        for _ in range(2):  # after the first they are due; the second puts in use what its pass computed
            optimizer.step()
            gradients(parallel, ids)
        torch.save({"gradients": first, "start": start, "codebooks": codebooks(model)}, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
    leave()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_two_processes_take_the_step_of_one(dense_steps: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, (str(tmp_path), dense_steps), nprocs=PROCESSES)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    expected = gradients(sparse_with_lora(dense_steps), inputs("llama", padding=None, batch=ROWS)["input_ids"])
    assert any("spt_router" in name for name in expected)
    assert any("lora" in name for name in expected)
    for found in (left["gradients"], right["gradients"]):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
    # Each process would refresh from its own rows; DDP keeps them at the first one's.
    assert all(torch.equal(*pair) for pair in zip(left["codebooks"], right["codebooks"], strict=True))
    assert all(not torch.equal(*pair) for pair in zip(left["codebooks"], left["start"], strict=True))
