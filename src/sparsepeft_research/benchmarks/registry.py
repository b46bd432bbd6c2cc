"""The benchmarks by name: what each measures, its parameters, and running it. Loads nothing of what it lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

from sparsepeft.errors import UserError, unknown_name
from sparsepeft.extras import require
from sparsepeft_research.benchmarks.settings import InferenceBenchmark, SptBenchmark
from sparsepeft_research.results import Result, describe_machine

Progress = Callable[[str], object]


def silent(message: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Parameter:
    """A setting of a benchmark.

    Attributes:
        name: as its function has it.
        default: taken where nothing is said.
        help: a sentence.
        choices: the values there are; empty for any of the type.
        type: of a value; None is that of ``default``.
        option: on the command line; by its name if left out.
        metavar: what an option of it takes, where that is not its type alone.
        several: reads each of several values that an option takes together; None where it takes one.
        parse: reads an option's value, where the type does not.
        variable: of the environment, that an option takes its value from.
        least: the smallest number that an option takes.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    type: Any = None
    option: str = ""
    metavar: str | None = None
    several: Callable[[str], Any] | None = None
    parse: Callable[[str], Any] | None = None
    variable: str | None = None
    least: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "option", f"--{(self.option or self.name).replace('_', '-')}")


@dataclass(frozen=True)
class Benchmark:
    """Something to measure.

    Attributes:
        name: of the benchmark, and of its module here.
        measures: what, in a sentence.
        parameters: of its ``run``, beside ``progress``; ``threads`` is set before.
        settings: the class of which ``run`` takes an object instead; its fields are parameters then.
        extra: of this package, with what it needs.
        example: options of a command that is shown.
        note: a sentence more.
        is_drawn: its report can be drawn.
        module: where its ``run`` is, if not in the module of its name.
    """

    name: str
    measures: str
    parameters: tuple[Parameter, ...] = ()
    settings: Any = None
    extra: str = "research"
    example: str = ""
    note: str = ""
    is_drawn: bool = False
    module: str = ""


def _fields(settings: type) -> tuple[Parameter, ...]:
    """The fields of a class that say what they are, and ``threads``."""
    types, defaults = get_type_hints(settings, include_extras=True), vars(settings)
    said = {name: each for name, each in types.items() if hasattr(each, "__metadata__")}
    threads = Parameter("threads", None, "CPU threads. [default: PyTorch's]", type=int | None, least=1)
    fields = (Parameter(n, defaults[n], type=each.__origin__, **each.__metadata__[0]) for n, each in said.items())
    return (*fields, threads)


def _common(repeats: int, *others: Parameter, seed: bool = True) -> tuple[Parameter, ...]:
    return (
        *others,
        Parameter("repeats", repeats, "Timed calls of each candidate."),
        Parameter("threads", 2, "Threads of every candidate."),
        Parameter("idle_wait", 0.0, "Seconds to wait for an idle machine before each round."),
        *((Parameter("seed", 0, "Of weights and inputs."),) if seed else ()),
    )


_PLACES = ("data_dir", "peer_folder")  # on one machine, so no settings of a result
_DEVICE = Parameter("device", "cpu", "Where the candidates run.", ("cpu", "cuda"))
_QUICK = Parameter("quick", False, "Tiny cases, to see that it works.")

BENCHMARKS = {
    one.name: one
    for one in (
        Benchmark(
            "inference",
            "throughput, latency and peak memory of a backbone with and without adapters, of peers, of many tasks",
            _fields(InferenceBenchmark),
            InferenceBenchmark,
            example="--precisions fp32,bf16 --mixed --output inference.json",
            note="Every system is a process of its own with equal threads (but see `--one-process`); they take turns.",
            is_drawn=True,
            module="inference.session",
        ),
        Benchmark(
            "spt",
            "a LoRA fine-tuning step, dense against sparse: time, where it goes, and peak memory above the weights",
            _fields(SptBenchmark),
            SptBenchmark,
            example="--model opt-1024 --lengths 2048,8192 --output spt.json",
        ),
        Benchmark(
            "step_memory",
            "where the memory of a whole LoRA step of a language model goes, head and loss included",
            (
                Parameter("model", "", "A causal language model: hub id or folder."),
                Parameter("length", 2048, "Tokens of the sequence.", least=2),
                Parameter("dtypes", "float32,bfloat16", "Of the weights (a,b).", metavar="DTYPES"),
                Parameter("only", "", "Candidates whose name contains this."),
                Parameter("threads", 2, "Threads; memory does not depend on them."),
                Parameter("seed", 0, "Of adapter and tokens."),
            ),
            example="--model MODEL --output step_memory.json",
        ),
        Benchmark(
            "memory",
            "memory_read in each implementation and as a plain gather, over the number of parents",
            _common(
                15,
                _DEVICE,
                Parameter("dtype", "fp32", "Of all tensors: fp32, bf16 or fp16.", metavar="DTYPE"),
                _QUICK,
            ),
        ),
        Benchmark(
            "large_memory",
            "a memory of up to 65,536 parents, read and trained: product keys beside a key for each parent",
            _common(7, _QUICK),
            module="memories.large",
        ),
        Benchmark(
            "sparse_attention",
            "sparse_attention against SDPA in time and memory, over the number of tokens",
            _common(7, _DEVICE, _QUICK),
        ),
        Benchmark(
            "routed_ffn",
            "routed_ffn against the dense FFN, over the number of active blocks",
            _common(9, _DEVICE, Parameter("only", "", "Cases whose name contains this."), _QUICK),
        ),
        Benchmark(
            "allocator",
            "what reusing freed memory gives: keep_freed_memory against the allocator as it is",
            _common(9, Parameter("language_model", "", "A causal model, for its case: hub id or folder.")),
        ),
        Benchmark(
            "finetuning",
            "steps per minute of every method and option, and of AdapterHub's adapters",
            _common(
                7,
                Parameter("data_dir", "", "Folder with the GLUE tasks; $SPARSEPEFT_DATA if left out."),
                Parameter("task", "mrpc", "Whose examples are used."),
                Parameter(
                    "model", "", "Hub id or folder of the backbone, for steps several (a,b); MiniLM if left out."
                ),
                Parameter("groups", "", "methods, options or steps (a,b); all if left out."),
                Parameter("only", "", "Sets of steps whose title contains this, such as `16 x 128, fp32`."),
                Parameter("peer_folder", "", "Where the peer's environment is kept; .peers/adapters if left out."),
                _QUICK,
            ),
            module="finetuning.report",
        ),
        Benchmark(
            "processors",
            "what the compiled kernels give on a kind of processor, against what was aimed at",
            _common(
                15, Parameter("processor", "native", "Kind of processor to be kept to.", ("native", "avx2")), seed=False
            ),
        ),
        Benchmark(
            "runtimes",
            "a bare encoder in PyTorch, torchao, ONNX Runtime and OpenVINO",
            _common(
                7,
                Parameter("model", "roberta-base", "As in `sparsepeft benchmark inference`."),
                Parameter("shapes", "32x128,1x32", "Batch size x tokens (a,b)."),
            ),
            extra="export-onnx",
        ),
        Benchmark(
            "adapters",
            "how far our bottleneck adapters are from AdapterHub's on the same weights and inputs",
            (Parameter("peer_folder", "", "Where the peer's environment is kept; .peers/adapters if left out."),),
        ),
    )
}


def run_benchmark(name: str, *, progress: Progress = silent, **values: Any) -> Result:
    """Run a benchmark.

    Args:
        name: one of :data:`BENCHMARKS`.
        progress: told what is being done.
        values: its parameters; those left out have their defaults.

    Raises:
        UserError: the benchmark or a parameter is unknown, a value cannot be used, or a library is missing.
        RunFailed: nothing could be measured.
    """
    if name not in BENCHMARKS:
        raise UserError(unknown_name("The benchmark", name, BENCHMARKS))
    benchmark = BENCHMARKS[name]
    try:
        module = importlib.import_module(f"{__package__}.{benchmark.module or name}")
    except ModuleNotFoundError as error:
        require(error.name or "", benchmark.extra, f"The benchmark {name}")
        raise
    known = {parameter.name: parameter for parameter in benchmark.parameters}
    for key, value in values.items():
        if key not in known and not hasattr(benchmark.settings, key):
            raise UserError(unknown_name("The parameter", key, known))
        if key in known and known[key].choices and value not in known[key].choices:
            raise UserError(unknown_name(f"`{key}`", str(value), known[key].choices))
    chosen = {key: parameter.default for key, parameter in known.items()} | values
    settings = {key: value for key, value in chosen.items() if key not in _PLACES}
    if (threads := chosen.pop("threads", None)) is not None:
        import torch

        torch.set_num_threads(threads)
    if benchmark.settings is not None:
        checked = benchmark.settings(**chosen)
        chosen, settings = {"benchmark": checked}, {"seed": checked.seed}
    elif chosen.get("repeats", 2) < 2:
        raise UserError(f"`repeats={chosen['repeats']}` was given; quartiles need at least 2.")
    seed = settings.get("seed")
    environment = describe_machine(seed)  # before: the load is that of others
    report = module.run(**chosen, progress=progress)
    settings |= report.pop("settings", {})
    environment["versions"] |= report.pop("versions", {})
    environment["threads"] = settings.get("threads", environment["threads"])
    return Result(name, settings, report.pop("results"), environment, seed, report)
