"""Measure some kinds of things.

python -m sparsepeft_research.experiments.service load faults --data-dir DATA --model MPNET
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sparsepeft.extras import require
from sparsepeft_research.experiments import service
from sparsepeft_research.experiments.service import faults, fuzz, load, speed
from sparsepeft_research.results import RESULTS, Result, describe_machine, write_result

KINDS = {"fuzz": fuzz.measure, "load": load.measure, "faults": faults.measure, "speed": speed.measure}


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write a result for each kind."""
    parser = argparse.ArgumentParser(description=service.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--data-dir", type=Path, required=True, help="with sst2, whose validation texts are sent")
    parser.add_argument("--model", help="the backbone: folder or hub id. [default: minilm]")
    parser.add_argument("--num-tasks", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=180, help="load: how long")
    parser.add_argument("--cases", type=int, default=5000, help="fuzz: at least so many")
    parser.add_argument("--swaps", type=int, default=1000, help="faults: of a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file. [default: the kind's]")
    parser.add_argument("--results", type=Path, default=RESULTS / "service", help="folder of the results")
    options = parser.parse_args(arguments)
    for library in ("aiohttp", "schemathesis"):
        require(library, "reliability", "This experiment")
    for kind in options.kinds:
        environment = describe_machine(options.seed)
        with tempfile.TemporaryDirectory() as work:
            settings, results = KINDS[kind](options, Path(work))
        about = {"model": Path(options.model).name if options.model else "minilm", "tasks": options.num_tasks}
        file = options.results / f"{options.name or kind}.json"
        write_result(file, Result(f"service-{kind}", about | settings, results, environment, options.seed))
        print(file)


if __name__ == "__main__":
    main()
