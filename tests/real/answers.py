"""A process of its own: what saved adapters answer on a backbone that was just loaded.

python -m tests.real.answers MODEL NUM_LABELS BATCH OUTPUT FOLDER...
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from tests.real.models import load_adapter, logits_of


def main(name: str, num_labels: str, batch: str, output: str, *folders: str) -> None:
    inputs = load_file(batch)
    answers = {
        Path(folder).name: logits_of(load_adapter(name, Path(folder), int(num_labels)), inputs) for folder in folders
    }
    save_file(answers, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
