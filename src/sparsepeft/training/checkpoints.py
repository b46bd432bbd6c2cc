"""Checkpoints as ``transformers.Trainer`` leaves them, of which a killed process may have written only a part."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that training can go on from; those that were cut short are passed over."""
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_complete(path):
            return path
        logger.warning("%s is incomplete or damaged and is passed over.", path)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether all can be read that training goes on with, the best checkpoint's weights included.

    Trainer writes file after file, the state last, and goes on in silence without an optimizer.
    """
    try:
        for file in checkpoint.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        states = {file.name for pattern in ("*.pt*", "*.bin") for file in checkpoint.glob(pattern)}
        for name in states:
            zipfile.ZipFile(checkpoint / name).close()  # whose directory is at its end
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):
        return False
    # The optimizer by its name's beginning: processes that share a model (FSDP) write files or folders of other names.
    has_optimizer = any(checkpoint.glob(f"{Path(OPTIMIZER_NAME).stem}*"))
    has_states = SCHEDULER_NAME in states and any(name.startswith("rng_state") for name in states)
    weights = [checkpoint] if best is None else [checkpoint, checkpoint.with_name(Path(best).name)]
    return has_optimizer and has_states and all(map(has_weights, weights))


def has_weights(folder: Path) -> bool:
    """Whether a checkpoint has weights that are whole."""
    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                opened.keys()
    except (OSError, SafetensorError):
        return False
    return bool(files)
