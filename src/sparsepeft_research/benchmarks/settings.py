"""What the benchmarks ``inference`` and ``spt`` measure, checked. Loads no torch: their options are made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparsepeft.errors import UserError, unknown_name
from sparsepeft_research.benchmarks.devices import DEVICES

if TYPE_CHECKING:
    from sparsepeft.spt import SptConfig

WORKLOADS = ("fixed", "tasks")
BACKBONE, FULL, UNFUSED, ENGINE, ENGINE_UPPER = "backbone", "full", "spartan-unfused", "engine", "engine-upper"
ADAPTED = ("spartan", "pfeiffer", "houlsby", "lora")
PEERS = {"adapters-pfeiffer": "pfeiffer", "adapters-houlsby": "houlsby"}
SYSTEMS = (BACKBONE, FULL, *ADAPTED, UNFUSED, ENGINE, *PEERS)
UNQUANTIZED = ("float32", "bfloat16")
ONNX, OPENVINO = "onnx-", "openvino-"  # before a precision: exported in that format, in its runtime
PRECISIONS = (*UNQUANTIZED, "int8", f"{ONNX}float32", f"{ONNX}int8", f"{OPENVINO}float32", f"{OPENVINO}bfloat16")


def about(help: str, **more: Any) -> dict[str, Any]:
    """What is said of a field that is a parameter of the benchmark: fields of :class:`.registry.Parameter`."""
    return {"help": help, **more}


def several(help: str, default: str, read: Callable[[str], Any] = str, metavar: str = "NAMES") -> dict[str, Any]:
    """The same of one that takes several values, each of which ``read`` reads."""
    return about(f"{help} (a,b or repeated). [default: {default}]", several=read, metavar=metavar)


def shape(text: str) -> tuple[int, int]:
    """``"32x128"``, a batch size and a length.

    Raises:
        UserError: it is something else.
    """
    size, x, length = text.partition("x")
    if not (x and size.isdecimal() and length.isdecimal()):
        raise UserError(f"`shapes={text}` was given; expected batch sizes and lengths, such as 32x128,1x32.")
    return int(size), int(length)


def precision(text: str) -> str:
    """``"onnx-bf16"`` -> ``"onnx-bfloat16"``, as result files have it.

    Raises:
        UserError: there is no such precision.
    """
    short = {name.replace("bfloat16", "bf16").replace("float32", "fp32"): name for name in PRECISIONS}
    if text not in (*short, *PRECISIONS):
        raise UserError(unknown_name("The precision", text, short))
    return short.get(text, text)


def count_or_fraction(text: str) -> int | float:
    """Told apart as Python does: 1 is a count, 1.0 a fraction."""
    return int(text) if text.strip().isdecimal() else float(text)


def _at_least(settings: Any, least: int, *names: str, reason: str = "pass at least {}.") -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UserError(f"`{name}={value}` was given; {reason.format(least)}")


_QUARTILES = "quartiles need at least {}."
_IDLE_WAIT = "Wait so long for an idle machine before each round."


@dataclass(frozen=True)
class SptBenchmark:
    """What to measure of a fine-tuning step: what each field is stands beside it. ``dtype`` may be PyTorch's name.

    Raises:
        UserError: a value is out of range.
    """

    model: Annotated[
        str,
        about(
            "opt-1024, opt-2048, opt-2560, llama-2560, llama-4096 (random weights), or a hub id or folder.",
            metavar="MODEL",
        ),
    ] = "opt-1024"
    layers: Annotated[int, about("Transformer layers.")] = 4
    lengths: Annotated[tuple[int, ...], several("Tokens of a sequence", "2048", int, "NUMBERS")] = (2048,)
    batch_size: Annotated[int, about("Sequences in a step.")] = 1
    similarity: Annotated[str, about("How keys are chosen: inner_product or matches.", metavar="NAME")] = (
        "inner_product"
    )
    granularity: Annotated[str, about("Sparse attention by token or block.", metavar="NAME")] = "block"
    values: Annotated[tuple[str, ...], several("What FFNs compute", "exact, routed")] = ("exact", "routed")
    num_blocks: Annotated[
        int | None, about("G, blocks of neurons of an FFN. [default: 32 with exact values, 8 with routed ones]")
    ] = None
    active_blocks: Annotated[
        tuple[int | float, ...],
        several("G', blocks that a token uses, or fractions of G", "0.5, 0.25", count_or_fraction, "NUMBERS"),
    ] = (1 / 2, 1 / 4)
    top_l: Annotated[
        int | float,
        about("Keys a query keeps: 64, or a fraction of the length, 0.5.", metavar="NUMBER", parse=count_or_fraction),
    ] = 1 / 8
    plan: Annotated[
        str,
        about("Also as a file says that `sparsepeft sparsify --budget` wrote for the model.", metavar="FILE"),
    ] = ""
    device: Annotated[str, about("cpu or cuda.", metavar="DEVICE")] = "cpu"
    dtype: Annotated[str, about("Of weights and activations: fp32, bf16 or fp16.", metavar="DTYPE")] = "fp32"
    repeats: Annotated[int, about("Timed steps of each candidate.")] = 5
    warm_up: int = 1  # untimed steps before
    idle_wait_s: Annotated[float, about(_IDLE_WAIT, metavar="SECONDS", option="idle_wait")] = 0.0
    compile: Annotated[bool, about("Measure the dense model through torch.compile, too.")] = False
    seed: int = 0  # of weights and data

    def __post_init__(self) -> None:
        from sparsepeft.devices import find_device
        from sparsepeft.tuners.config import dtype_name

        _at_least(self, 1, "layers", "batch_size", "warm_up", reason="but it must be at least {}.")
        lengths = ",".join(map(str, self.lengths))
        if not self.lengths or min(self.lengths) < 2:
            raise UserError(f"`lengths={lengths}` was given; expected at least one, each of 2 tokens or more.")
        _at_least(self, 2, "repeats", reason=_QUARTILES)
        try:
            object.__setattr__(self, "dtype", dtype_name("dtype", self.dtype))  # as results have it
        except ValueError as error:
            raise UserError(str(error)) from error
        if find_device(self.device).type not in ("cpu", "cuda"):
            raise UserError(f"`device={self.device}` was given, but steps are timed on cpu and cuda only; pass cpu.")
        for active in self.active_blocks:
            for values in self.values:
                self.spt(self.lengths[0], active=active, values=values)
        self.planned()

    def spt(
        self, length: int, *, attention: bool = True, active: int | float | None = None, values: str = "exact"
    ) -> SptConfig:
        """The settings of a sparse candidate; ``active`` None leaves its FFNs dense."""
        from sparsepeft.spt import SptConfig

        blocks: dict[str, Any] = {} if self.num_blocks is None else {"num_blocks": self.num_blocks}
        try:
            config = SptConfig(
                attention=attention,
                ffn=active is not None,
                top_l=self.top_l,
                similarity=self.similarity,
                granularity=self.granularity,
                values=values,
                num_active_blocks=1.0 if active is None else active,
                **blocks,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return config.with_length(length)

    def planned(self) -> SptConfig | None:
        """The settings that ``plan`` holds, with those of single modules; None without a plan."""
        import dataclasses
        import json

        from sparsepeft.spt import SptConfig

        if not self.plan:
            return None
        try:
            content = json.loads(Path(self.plan).read_text(encoding="utf-8"))
            config = SptConfig.from_json(json.dumps(content.get("spt", content)["config"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"`plan={self.plan}` was given, but it holds no settings ({error!r}); pass a sparse model's spt.json."
            ) from error
        return dataclasses.replace(config, budget=None)


@dataclass(frozen=True)
class InferenceBenchmark:
    """What to measure of inference: what each field is stands beside it.

    Threads are torch's number, on an emulated device no more than it has cores. The first of the ``precisions`` is that
    of mixed batches, which are made at the first of the ``shapes``.

    Raises:
        UserError: a value is unknown or out of range.
    """

    model: Annotated[
        str, about("roberta-base (random weights, nothing to download), minilm, a hub id or a folder.", metavar="MODEL")
    ] = "roberta-base"
    # For tasks, where all precisions are in memory at once, those that the factors are made of.
    systems: Annotated[
        tuple[str, ...] | None,
        several(f"Some of {', '.join(SYSTEMS)}", "all; for tasks: backbone, spartan, engine and the adapters-"),
    ] = None
    precisions: Annotated[
        tuple[str, ...],
        several("Some of fp32, bf16, int8, onnx-fp32, onnx-int8, openvino-fp32, openvino-bf16", "all", precision),
    ] = PRECISIONS
    workload: Annotated[
        str, about("fixed: texts of one length; tasks: texts as long as tasks have them.", metavar="NAME")
    ] = "fixed"
    shapes: Annotated[
        tuple[tuple[int, int], ...],
        about(
            "fixed: batch size x tokens (a,b or repeated); 1 x is latency. [default: 32x128, 1x32]",
            metavar="SHAPES",
            several=shape,
        ),
    ] = ((32, 128), (1, 32))
    tasks: Annotated[tuple[str, ...], several("tasks: whose validation texts", "sst2, mrpc, qnli")] = (
        "sst2",
        "mrpc",
        "qnli",
    )
    data_dir: Annotated[
        Path | None,
        about(
            "Folder with the tasks' files. [default: $SPARSEPEFT_DATA, else the hub]",
            metavar="DIR",
            variable="SPARSEPEFT_DATA",
        ),
    ] = None
    max_inputs: Annotated[
        int | None, about("tasks: a sample of so many texts of each; 0 takes all.", option="max_examples", least=0)
    ] = 256
    mixed: Annotated[bool, about("fixed: nine tasks in a batch, nine for each text, a hundred in memory, too.")] = False
    device: Annotated[str, about("cpu: the systems are compared on processors.", metavar="DEVICE")] = "cpu"
    emulate: Annotated[str | None, about("With the limits of raspberry-pi-4 or iphone-11.", metavar="NAME")] = None
    peers_python: Annotated[
        Path | None, about("Python of an environment with AdapterHub's adapters; see docs/edge.md.", metavar="FILE")
    ] = None
    repeats: Annotated[int, about("Timed passes of each candidate; ten times as many for latency.")] = 9
    # What a process finds in memory makes it a little faster or slower.
    starts: Annotated[int, about("Times that all processes are started, each for all repeats.", least=1)] = 1
    # So that this does not part them; their peak memory cannot be told apart then.
    one_process: Annotated[bool, about("The backbone and its adapted forms share a process and its weights.")] = False
    idle_wait_s: Annotated[float, about(_IDLE_WAIT, metavar="SECONDS", option="idle_wait")] = 0.0
    seed: Annotated[int, about("Of weights and texts.")] = 0

    def __post_init__(self) -> None:
        checked: tuple[tuple[str, tuple[str, ...], Any], ...] = (
            ("The system", self.chosen_systems, SYSTEMS),
            ("The precision", self.precisions, PRECISIONS),
            ("The workload", (self.workload,), WORKLOADS),
            ("The device", (self.emulate,) if self.emulate is not None else (), DEVICES),
        )
        for kind, names, valid in checked:
            for name in names:
                if name not in valid:
                    raise UserError(unknown_name(kind, name, valid))
        if self.device != "cpu":
            raise UserError(
                f"`device={self.device}` was given, but this benchmark compares processors; leave it out, or pass cpu."
            )
        for option in ("chosen_systems", "precisions", "shapes"):
            if not getattr(self, option):
                raise UserError(f"No `{option.removeprefix('chosen_')}` were given; pass at least one.")
        shapes = ",".join("x".join(map(str, each)) for each in self.shapes)
        if any(min(each) < 1 for each in self.shapes):
            raise UserError(f"`shapes={shapes}` was given; expected numbers of at least 1, as in 32x128.")
        _at_least(self, 2, "repeats", reason=_QUARTILES)
        _at_least(self, 1, "starts")
        _at_least(self, 0, "max_inputs", reason="pass at least {}, which takes all.")
        object.__setattr__(self, "max_inputs", self.max_inputs or None)
        if self.mixed and (self.workload != "fixed" or self.precisions[0] not in UNQUANTIZED):
            raise UserError(
                "`mixed=True` was given, but batches are mixed with the `workload` fixed only, in the first of the "
                "`precisions`, which must be float32 or bfloat16."
            )
        if self.peers_python is not None and not self.peers_python.is_file():
            raise UserError(
                f"`peers_python={self.peers_python}` was given, but there is no such file; pass the Python of an "
                "environment with the package adapters, or leave it out."
            )

    @property
    def chosen_systems(self) -> tuple[str, ...]:
        """The systems to measure."""
        if self.systems is not None:
            return self.systems
        return SYSTEMS if self.workload == "fixed" else (BACKBONE, "spartan", ENGINE, *PEERS)

    @property
    def num_threads(self) -> int:
        """Threads of each process."""
        import torch

        threads = torch.get_num_threads()
        return threads if self.emulate is None else min(threads, DEVICES[self.emulate].num_cores)
