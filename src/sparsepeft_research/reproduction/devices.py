"""Table 1's device throughput, from files of ``sparsepeft benchmark inference --emulate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.storage.counting import load_config
from sparsepeft_research.benchmarks.devices import DEVICES
from sparsepeft_research.benchmarks.inference import architecture, device_throughput


def read_devices(files: Sequence[Path], model: str | None) -> dict[str, dict[str, float]]:
    """Read inputs per minute by device, then by method.

    Args:
        files: JSON files of the benchmark.
        model: the backbone of the table; its weights do not matter for speed, its sizes do.

    Raises:
        UserError: a file cannot be read, is not of an emulated device, or of a backbone of other sizes.
    """
    found: dict[str, dict[str, float]] = {}
    wanted = architecture(load_config(resolve_model(model))) if files else {}
    for path in files:
        try:
            device, measured, rates = device_throughput(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} holds no throughput of a device ({error}); write it with `sparsepeft benchmark inference "
                f"--emulate {next(iter(DEVICES))} --output {path}`."
            ) from error
        if measured != wanted:
            raise UserError(
                f"{path} was measured with a backbone of other sizes ({measured}) than the table's ({wanted}); measure "
                "the table's own `model`."
            )
        found[device] = rates
    return found
