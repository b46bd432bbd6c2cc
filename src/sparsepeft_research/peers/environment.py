"""A virtual environment for AdapterHub's library, which needs an older transformers than this project's.

python -m sparsepeft_research.peers.environment      # makes it, and prints its Python, for --peers-python
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from sparsepeft.errors import RunFailed

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = Path(".peers", "adapters")  # of the current folder
# The first is torch. Too old for this project's own environment.
REQUIREMENTS = ("torch==2.13.0", "adapters==1.3.0", "transformers==4.57.6", "safetensors==0.8.0", "numpy==2.4.6")


def peer_python(folder: Path = DEFAULT_FOLDER) -> Path:
    """Return the Python of the environment with ``REQUIREMENTS``, made in ``folder`` if it is not there yet.

    An environment that was not finished, or was made from other requirements, is made anew. pip's own configuration
    says where packages come from.

    Raises:
        RunFailed: ``folder`` holds something else, or pip could not install the requirements.
    """
    folder = folder.absolute()
    python = folder / "bin" / "python"
    marker = folder / "complete.sha256"
    digest = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()
    if python.exists() and marker.exists() and marker.read_text() == digest:
        return python
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise RunFailed(f"{folder} is no virtual environment and is not empty; name another folder, or empty it.")
    print(f"making the environment {folder} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone, by its exact version: resolved with others it may pull gigabytes of CUDA packages.
    _run([*pip, REQUIREMENTS[0]])
    _run([*pip, *REQUIREMENTS])
    marker.write_text(digest)
    return python


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RunFailed(
            f"{' '.join(command)} failed; make the packages it names reachable (a network or a package index) and "
            f"start again:\n{finished.stderr.strip()}"
        )


if __name__ == "__main__":
    print(peer_python())
