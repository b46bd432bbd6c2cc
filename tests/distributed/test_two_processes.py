"""DDP and FSDP2 with two CPU processes: as one process with all the data, and what they save is whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.distributed.cases import CASES, STEPS, job
from tests.spt.models import SIZES, build

from sparsepeft_research.experiments.processes import Job, run_jobs, train

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STRATEGIES = ("ddp", "fsdp2")
NUM_LAYERS = SIZES["num_hidden_layers"]
HALFWAY = f"checkpoint-{STEPS // 2}"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Job]:
    """Everything that one process and two train, by what and how; the two in a single start."""
    root = tmp_path_factory.mktemp("processes")
    done = {(name, strategy): job(name, strategy, root / name / strategy) for name in CASES for strategy in STRATEGIES}
    alone = {(name, "one"): job(name, "one", root / name / "one") for name in CASES}
    for each in alone.values():
        train(each)
    started_alone = {"resume_from": alone["spartan", "one"].folder / HALFWAY}
    done["spartan", "one-then-ddp"] = job("spartan", "ddp", root / "one-then-ddp", **started_alone)
    started_sharded = {"resume_from": done["spartan", "fsdp2"].folder / HALFWAY}
    done["spartan", "fsdp2-again"] = job("spartan", "fsdp2", root / "fsdp2-again", **started_sharded)
    run_jobs(list(done.values()), root)
    started_by_two = {"resume_from": done["spartan", "ddp"].folder / HALFWAY}
    alone["spartan", "ddp-then-one"] = job("spartan", "one", root / "ddp-then-one", **started_by_two)
    train(alone["spartan", "ddp-then-one"])
    return done | alone


def log(done: Job) -> dict[str, Any]:
    return json.loads((done.folder / "log.json").read_text())


def weights(done: Job) -> dict[str, torch.Tensor]:
    return load_file(done.folder / "saved" / "adapter_model.safetensors")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_and_save_all_of_it(name: str, strategy: str, jobs) -> None:
    one, two = jobs[name, "one"], jobs[name, strategy]
    tolerance = CASES[name].tolerance
    assert len(log(one)["losses"]) == STEPS
    assert log(two)["losses"] == pytest.approx(log(one)["losses"], abs=tolerance)
    expected, found = weights(one), weights(two)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, atol=max(1e-4, tolerance), rtol=0, msg=key)
    if name == "spartan-bf16":
        assert all(tensor.dtype == torch.float32 for key, tensor in found.items() if "memory" in key)
    if strategy == "ddp":
        assert log(two)["gradient_bytes_per_step"] == 4 * log(two)["trained_parameters"]
    else:
        assert log(two)["sharded_modules"] > NUM_LAYERS  # each by itself, and what is left


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_two_processes_saved_loads_alone(strategy: str, jobs) -> None:
    saved = jobs["spartan", strategy].folder / "saved"
    ids = torch.arange(3, 15).view(2, 6)
    answers = []
    for folder in (saved, jobs["spartan", "one"].folder / "saved"):
        with torch.no_grad():
            answers.append(PeftModel.from_pretrained(build("bert"), folder).eval()(input_ids=ids).logits)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", ["one-then-ddp", "ddp-then-one", "fsdp2-again"])
def test_training_goes_on_in_another_number_of_processes(way: str, jobs) -> None:
    went_on, whole = log(jobs["spartan", way])["losses"], log(jobs["spartan", "one"])["losses"]
    assert went_on == pytest.approx(whole, abs=1e-5)
    for key, tensor in weights(jobs["spartan", "one"]).items():
        torch.testing.assert_close(weights(jobs["spartan", way])[key], tensor, atol=1e-4, rtol=0, msg=key)
