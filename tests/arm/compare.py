"""``make test-arm``: exported tasks label real texts on an emulated Raspberry Pi 4 as they do here.

Trains three tasks on the bundled MiniLM for a few steps, exports them in float32 and in int8, and lets the exported
``run.py`` label 100 texts of each task's validation set twice: with this machine's Python, and with Debian's arm64
Python on a Cortex-A72 that qemu emulates (its answers are real, its clock is not). Set-up goes into ``.arm``, which git
ignores.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / ".arm"
TASKS = ("sst2", "rte", "bbc-news")
NUM_TEXTS = 100
_MAX_LENGTH = 32  # an emulated text of 32 tokens takes about a second


def main() -> int:
    """Set up, export, compare; 0 if all labels agree."""
    data = os.environ.get("SPARSEPEFT_DATA")
    if not data or not Path(data).is_dir():
        print("make test-arm needs real data: set SPARSEPEFT_DATA to its folder (see docs/data.md).", file=sys.stderr)
        return 1
    start = time.monotonic()
    if subprocess.run(["bash", str(Path(__file__).with_name("setup.sh")), str(ARM), sys.executable]).returncode:
        return 1
    folders = [_train(task, data) for task in TASKS]
    texts = {folder.name: _texts(folder) for folder in folders}
    runs = []
    for dtype in ("float32", "int8"):
        exported = ARM / f"export-{dtype}"
        _sparsepeft("export", *folders, "--output-dir", exported, "--max-examples", NUM_TEXTS, "--overwrite",
                    *(["--int8"] if dtype == "int8" else []))  # fmt: skip
        runs += [(dtype, exported, task, lines) for task, lines in texts.items()]
    cores: queue.Queue[int] = queue.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    failed = 0
    with ThreadPoolExecutor(cores.qsize()) as pool:
        for line, passed in pool.map(lambda run: _compare(*run, cores), runs):
            print(line, flush=True)
            failed += not passed
    print(f"{'FAILED' if failed else 'passed'} in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def _train(task: str, data: str) -> Path:
    folder = ARM / "tasks" / task
    if not (folder / "results.json").exists():
        _sparsepeft("train", "--task", task, "--data-dir", data, "--output-dir", folder, "--max-steps", 150,
                    "--few-shot", 200, "--max-length", _MAX_LENGTH)  # fmt: skip
    return folder


def _sparsepeft(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "sparsepeft_cli", *map(str, arguments)], check=True)


def _texts(folder: Path) -> str:
    """Lines of standard input for ``run.py``."""
    from sparsepeft.export.checking import examples_of
    from sparsepeft.export.tasks import read_tasks

    (task,) = read_tasks([folder])
    texts = examples_of(task, None, NUM_TEXTS).texts
    inputs = [[text] if isinstance(text, str) else text for text in texts]
    return "".join("\t".join(" ".join(part.split()) for part in parts) + "\n" for parts in inputs)


def _compare(dtype: str, exported: Path, task: str, lines: str, cores: queue.Queue[int]) -> tuple[str, bool]:
    """A line on one task, and whether all is well."""
    core = cores.get()
    try:
        # One core each: ONNX Runtime's threads would wait for each other by spinning, which emulation makes dear.
        here, there = (
            _labels(["taskset", "-c", str(core), *command], exported, task, lines)
            for command in ([sys.executable], _emulated())
        )
    finally:
        cores.put(core)
    different = sum(one != other for one, other in zip(here, there, strict=True))
    kinds = len(set(here))
    line = f"{dtype:<8} {task:<9} {len(here)} texts, {kinds} labels, {different} differ on the Cortex-A72"
    return line, not different and kinds > 1 and len(here) == NUM_TEXTS


def _emulated() -> list[str]:
    root = ARM / "root"
    qemu = root / "usr/bin/qemu-aarch64-static"
    return [str(qemu), "-cpu", "cortex-a72", "-L", str(root), "-E", f"PYTHONPATH={root}/site",
            str(root / "usr/bin/python3.11")]  # fmt: skip


def _labels(command: list[str], exported: Path, task: str, lines: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*command, str(exported / "run.py"), task], input=lines, stdout=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"run.py failed with exit code {done.returncode} under {command[0]}.")
    return [json.loads(line)["label"] for line in done.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
