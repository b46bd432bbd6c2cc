"""What installing the library brings beside torch and transformers, and what importing it costs.

    python -m sparsepeft_research.experiments.packaging --source before=OTHER_CHECKOUT --source after=.

For each source a wheel is built and installed, without extras, into an environment that has torch and transformers.
Sizes are of the files that pip installs; import times are medians over processes that take turns. The result is
``research/results/packaging.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparsepeft_research.results import RESULTS, ROOT, Result, describe_machine, write_result

BESIDE = ("torch", "transformers")
IMPORTS = ("import peft", "import sparsepeft", "from sparsepeft import SpartanConfig")
_SIZES = """
import importlib.metadata, json
print(json.dumps({
    each.name: sum(file.locate().stat().st_size for file in each.files or () if file.locate().is_file())
    for each in importlib.metadata.distributions()
}))
"""


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", required=True, help="LABEL=FOLDER: a checkout, by its label")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each import")
    arguments = parser.parse_args()
    environment = describe_machine(None)
    sources = dict(source.split("=", 1) for source in arguments.source)
    results = {label: measure(Path(folder).resolve(), arguments.repeats) for label, folder in sources.items()}
    settings = {"beside": list(BESIDE), "repeats": arguments.repeats}
    write_result(RESULTS / "packaging.json", Result("packaging", settings, results, environment))


def measure(source: Path, repeats: int) -> dict[str, object]:
    """Install a checkout into a fresh environment.

    Returns:
        ``added_mib``: by distribution, what it brought; ``total_mib``: their sum; ``import_s``: by statement, seconds
        of a process that runs it, less those of one that does nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder, "bin", "python")
        constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        install = (str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"))
        for name in BESIDE:  # torch first, alone and by its exact version: a looser request may bring CUDA's packages
            run(*install, next(line for line in constraints if line.startswith(f"{name}==")))
        before = json.loads(run(str(python), "-c", _SIZES))
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(source))
        run(*install, *map(str, Path(folder).glob("*.whl")))
        added = {
            name: round(size / 2**20, 2)
            for name, size in sorted(json.loads(run(str(python), "-c", _SIZES)).items())
            if name not in before
        }
        seconds: dict[str, list[float]] = {statement: [] for statement in ("pass", *IMPORTS)}
        for number in range(repeats + 1):
            for statement, measured in seconds.items():
                start = time.perf_counter()
                run(str(python), "-c", statement)
                if number:  # the first compiles
                    measured.append(time.perf_counter() - start)
        idle, *others = map(statistics.median, seconds.values())
        return {
            "added_mib": added,
            "total_mib": round(sum(added.values()), 2),
            "import_s": dict(zip(IMPORTS, (round(each - idle, 3) for each in others), strict=True)),
        }


def run(*command: str) -> str:
    """What a command prints, in a process of its own that does not see this checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables, cwd="/").stdout


if __name__ == "__main__":
    main()
