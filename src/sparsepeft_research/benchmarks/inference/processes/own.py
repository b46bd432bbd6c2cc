"""One of this package's systems: ``python -m sparsepeft_research.benchmarks.inference.processes.own SETTINGS.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from sparsepeft_research.benchmarks.devices import emulate
from sparsepeft_research.benchmarks.inference.loading import measure_loading
from sparsepeft_research.benchmarks.inference.processes.serving import Pass, serve
from sparsepeft_research.benchmarks.inference.systems import LOADING, prepare_system


def prepare(settings: dict[str, Any]) -> tuple[Mapping[str, Pass], dict[str, Any]]:
    """Limit this process to the device, then build the system."""
    torch.set_num_threads(settings["threads"])
    about: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if settings["device"] is not None:
        about["emulation"] = dataclasses.asdict(emulate(settings["device"]))
    if settings["system"] == LOADING:
        return {}, about | measure_loading(settings)
    return prepare_system(settings), about


if __name__ == "__main__":
    serve(prepare)
