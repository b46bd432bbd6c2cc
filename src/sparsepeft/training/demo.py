"""The demonstration: one small task from start to use, on a CPU in two minutes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from sparsepeft.errors import UserError
from sparsepeft.inference.portable import Prediction
from sparsepeft.inference.predictor import Predictor
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import RUN, read_run
from sparsepeft.tasks import load_task
from sparsepeft.training.run import train

TASK = "topics"
FOLDER, EPOCHS = Path("outputs/demo"), 6
_MAY_DIFFER = ("output_dir", "epochs")
TEXTS = (
    "The bakery chain will close forty shops after rents doubled and flour prices kept climbing.",
    "A week of ferry rides between the islands costs less than one night in the capital.",
    "Nurses at the clinic now text patients the evening before, and missed appointments have halved.",
)


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration shows.

    Attributes:
        spartan, head: results of the two runs, as in ``results.json``.
        majority: share of the test set's most frequent label.
        throughput_ratio: inputs per second with the memory over the bare backbone's, median of alternating passes.
        predictions: labels for :data:`TEXTS`.
    """

    spartan: dict[str, Any]
    head: dict[str, Any]
    majority: float
    throughput_ratio: float
    predictions: list[tuple[str, Prediction]]


def demo_config(method: str, folder: Path = FOLDER, epochs: float = EPOCHS) -> RunConfig:
    """The run of a method; its folder is the method's inside ``folder``."""
    return RunConfig(task=TASK, method=method, output_dir=str(folder / method), epochs=epochs)


def run_demo(
    folder: Path, epochs: float = EPOCHS, callbacks: Callable[[str], Sequence[TrainerCallback]] = lambda name: ()
) -> DemoResult:
    """Train a head alone and a SPARTAN memory on the built-in sample, and compare.

    Args:
        folder: for the two runs, which replace those of a former demonstration.
        epochs: passes over the training part.
        callbacks: for the run of a method, shown loss and metrics.

    Raises:
        UserError: the folder holds something else.
    """
    results = {}
    for method in ("head", "spartan"):
        config = demo_config(method, folder, epochs)
        results[method] = train(config, callbacks(method), overwrite=_is_demo(config))
    test = load_task(TASK).test
    assert test is not None  # the built-in sample has one
    labels = Counter(test["label"][:])
    predictor = Predictor(folder / "spartan")
    texts = list(test["text"][:])
    return DemoResult(
        spartan=results["spartan"],
        head=results["head"],
        majority=max(labels.values()) / len(test),
        throughput_ratio=throughput_ratio(predictor, texts),
        predictions=list(zip(TEXTS, predictor.predict(TEXTS), strict=True)),
    )


def _is_demo(config: RunConfig) -> bool:
    """Whether what stands in a run's output folder is a demonstration's, which may be replaced."""
    folder = Path(config.output_dir)
    if not (folder / RUN).exists():
        return False
    former = read_run(folder)["config"]
    if any(former[key] != value for key, value in config.to_dict().items() if key in former and key not in _MAY_DIFFER):
        raise UserError(f"{folder} holds a run that is not the demonstration's; pass another `output_dir`.")
    return True


def throughput_ratio(predictor: Predictor, texts: list[str], repeats: int = 7) -> float:
    """Inputs per second with the adapter over without, the two alternating."""
    model = predictor.model
    if not isinstance(model, PeftModel):
        raise TypeError(f"{type(model).__name__} has no adapter to switch off; pass a run of an adapter method.")

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            predictor.logits(texts)
        return time.perf_counter() - start

    with_adapter, without = [], []
    predictor.logits(texts)  # warm-up
    for _ in range(repeats):
        with_adapter.append(seconds())
        with model.disable_adapter():
            without.append(seconds())
    return statistics.median(without) / statistics.median(with_adapter)
