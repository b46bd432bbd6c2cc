"""Sparse gradients in training: the optimizer, clipping, and whole runs that use them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors.torch import load_file
from tests.models import SMALL, build
from tests.tiny import Interrupt, run_config
from torch import Tensor, nn

from sparsepeft import SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.layers import ProductKeyMemory, SparseMemory
from sparsepeft.training import LazyAdamW, SparseGradientTrainer, sparse_gradients, train
from sparsepeft.training.sparse_gradients import clip_grad_norm, use_sparse_gradients

ROWS = 40
SETTINGS = {"weight_decay": 0.1, "lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6}


def table() -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, 3, 5, generator=torch.Generator().manual_seed(1)))


def sparse_gradient(rows: list[int], seed: int) -> Tensor:
    values = torch.randn(len(rows), 3, 5, generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (ROWS, 3, 5))


def train_on(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert parameter.grad is not None


def test_where_all_rows_are_touched_it_is_adamw() -> None:
    lazy, eager, dense = table(), table(), table()
    every = [sparse_gradient(list(range(ROWS)), seed) for seed in range(5)]
    train_on(LazyAdamW([lazy], **SETTINGS), lazy, every)
    train_on(torch.optim.AdamW([eager], **SETTINGS), eager, [gradient.to_dense() for gradient in every])
    torch.testing.assert_close(lazy, eager)
    train_on(LazyAdamW([dense], **SETTINGS), dense, [gradient.to_dense() for gradient in every])
    assert torch.equal(dense, eager)


def test_rows_are_updated_as_by_sparse_adam_and_others_not_at_all() -> None:
    lazy, peer = table(), table()
    before = lazy.detach().clone()
    gradients = [sparse_gradient(rows, seed) for seed, rows in enumerate([[3, 9, 9], [9, 30], [], [3], [30, 0]])]
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-12}  # which both add, but at other places
    optimizer = LazyAdamW([lazy], weight_decay=0.0, **settings)
    train_on(optimizer, lazy, gradients)
    train_on(torch.optim.SparseAdam([peer], **settings), peer, gradients)
    torch.testing.assert_close(lazy, peer)
    state = optimizer.state_dict()["state"][0]
    assert state["rows"].tolist() == [3, 9, 30, 0]  # in the order of their first step
    assert state["rows_exp_avg"].shape == state["rows_exp_avg_sq"].shape == (4, 3, 5)
    assert optimizer.state[lazy]["exp_avg"].shape[1:] == (3, 5)  # which the saved one leaves as it is
    decaying = table()
    train_on(LazyAdamW([decaying], **SETTINGS), decaying, gradients)
    untouched = [row for row in range(ROWS) if row not in (0, 3, 9, 30)]
    assert torch.equal(decaying[untouched], before[untouched])
    assert not torch.isclose(decaying[[0, 3, 9, 30]], lazy[[0, 3, 9, 30]]).all()


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    gradients = [sparse_gradient(rows, seed) for seed, rows in enumerate([[3, 9], [9, 30], [12, 3], [30, 1, 9]])]
    whole, resumed = table(), table()
    train_on(LazyAdamW([whole], **SETTINGS), whole, gradients)
    optimizer = LazyAdamW([resumed], **SETTINGS)
    train_on(optimizer, resumed, gradients[:2])
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = LazyAdamW([resumed], **SETTINGS)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state[resumed]["rows"].dtype == torch.long
    torch.save((other, resumed), file := io.BytesIO())
    file.seek(0)
    for each, its in (copy.deepcopy((other, resumed)), torch.load(file, weights_only=False), (other, resumed)):
        train_on(each, its, gradients[2:])
        assert torch.equal(its, whole)
    fused = torch.optim.AdamW([foreign := table()], fused=True)
    fused.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):  # and not a write beyond the end of what is there
        train_on(fused, foreign, [gradients[0].to_dense()])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    hooks = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    train_on(optimizer, resumed, gradients[:1])
    assert hooks == [1]  # a step is a step, whatever is done in it
    mixed, eager = (
        table(),
        table(),
    )  # gradients become dense, as where the flag of a memory is changed, and sparse again
    dense = [sparse_gradient(list(range(ROWS)), seed) for seed in range(3)]
    train_on(LazyAdamW([mixed], **SETTINGS), mixed, [dense[0], dense[1].to_dense(), dense[2]])
    train_on(torch.optim.AdamW([eager], **SETTINGS), eager, [gradient.to_dense() for gradient in dense])
    torch.testing.assert_close(mixed, eager)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="amsgrad"):
        LazyAdamW([whole], amsgrad=True)


def test_clipping_counts_all_gradients_together() -> None:
    gradient = sparse_gradient([3, 9, 9], 0)
    parameters = [table(), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))]
    dense = copy.deepcopy(parameters)
    parameters[0].grad, dense[0].grad = gradient, gradient.to_dense()
    for each in (parameters, dense):
        each[1].grad = torch.arange(4.0)
    for limit in (100.0, 0.5):
        expected = nn.utils.clip_grad_norm_(dense, limit)
        torch.testing.assert_close(clip_grad_norm(parameters, limit), expected)
        for one, other in zip(parameters[:2], dense[:2], strict=True):
            torch.testing.assert_close(one.grad.to_dense(), other.grad)


def test_who_decides_on_sparse_gradients() -> None:
    def memory(**config: Any) -> SparseMemory:
        model = get_peft_model(build("bert"), SpartanConfig(**(SMALL | config)))
        use_sparse_gradients(model)
        return next(module for module in model.modules() if isinstance(module, SparseMemory))

    assert memory().sparse_gradients is False
    assert memory(sparse_gradients=True).sparse_gradients is True
    large = {"num_parents": 5476, "num_children": 3, "parent_keys": "product"}
    assert memory(**large).sparse_gradients is True
    assert memory(**large, sparse_gradients=False).sparse_gradients is False
    several = ProductKeyMemory(8, 9, 2, 2)
    assert not use_sparse_gradients(several, is_possible=False)
    several.sparse_gradients = True
    with pytest.raises(UserError, match="several processes"):
        use_sparse_gradients(several, is_possible=False)
    assert not use_sparse_gradients(several.requires_grad_(False))


class _Watch(hf.TrainerCallback):
    """Notes what a memory has in training, and may end it."""

    def __init__(self, memory: SparseMemory, fails: bool) -> None:
        self.memory, self.fails, self.seen = memory, fails, []  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append((self.memory.sparse_gradients, getattr(optimizer, "optimizer", optimizer).__class__))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fails:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("many", "optimizer"), [(12, LazyAdamW), (1 << 14, torch.optim.AdamW)])
def test_after_training_another_optimizer_can_go_on(
    many: int, optimizer: type, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_gradients, "_MANY_CELLS", many)
    model = get_peft_model(build("bert"), SpartanConfig(**SMALL))
    memories = [module for module in model.modules() if isinstance(module, SparseMemory)]
    arguments = hf.TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    row = {"input_ids": torch.arange(5, 11), "labels": torch.tensor(1)}
    watch = _Watch(memories[0], fails)
    trainer = SparseGradientTrainer(model, arguments, train_dataset=[row] * 16, callbacks=[watch])  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        trainer.train()
    assert set(watch.seen) == {(optimizer is LazyAdamW, optimizer)}
    assert {memory.sparse_gradients for memory in memories} == {None}
    other = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    other.zero_grad()
    model(**{name: value[None] for name, value in row.items()}).loss.backward()
    assert not any(memory.child_keys.grad.is_sparse for memory in memories)
    other.step()


def test_a_run_with_moments_of_some_rows_goes_on_with_dense_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the processes have become several, or the config another."""
    rows = [{"input_ids": torch.arange(5, 11) + number, "labels": torch.tensor(number % 2)} for number in range(16)]
    initial = get_peft_model(build("bert"), SpartanConfig(**SMALL))
    for many, steps in ((12, 2), (1 << 14, 4)):
        monkeypatch.setattr(sparse_gradients, "_MANY_CELLS", many)
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
        )
        trainer = SparseGradientTrainer(copy.deepcopy(initial), arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=steps > 2)
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), LazyAdamW)
        assert has_rows(trainer.optimizer) == (steps == 2)
    assert trainer.state.global_step == 4


def has_rows(optimizer: Any) -> bool:
    return any("rows" in state for state in optimizer.state.values())


@pytest.mark.slow
@pytest.mark.parametrize("parent_keys", ["product", "flat"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    parent_keys: str, tiny_backbone: Path, trained: Callable[..., tuple[Path, dict]], tmp_path: Path
) -> None:
    settings = {"parent_keys": parent_keys, "num_parents": 196, "top_k": 2, "sparse_gradients": True}
    options = {"settings": settings, "weight_decay": 0.01, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    whole, results = trained(**options)
    assert results["hyperparameters"]["optimizer"] == "LazyAdamW"
    with pytest.raises(KeyboardInterrupt):
        train(run_config(tiny_backbone, tmp_path / "run", **options), callbacks=[Interrupt(7)])
    assert train(run_config(tiny_backbone, tmp_path / "run", **options))["metrics"] == results["metrics"]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, tmp_path / "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    dense, expected = trained(**(options | {"settings": settings | {"sparse_gradients": False}}))
    assert expected["hyperparameters"]["optimizer"] != "LazyAdamW"
    values = (load_file(folder / "adapter_model.safetensors") for folder in (whole, dense))
    moved = [tensors[next(name for name in tensors if name.endswith("child_keys"))] for tensors in values]
    assert torch.corrcoef(torch.stack(moved).flatten(1))[0, 1] > 0.99  # as far as lazy moments are those of Adam
