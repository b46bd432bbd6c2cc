"""A finished run on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME

from sparsepeft.backbones import public_name
from sparsepeft.errors import RunFailed, UserError, first_line
from sparsepeft.runs.card import CARD, model_card
from sparsepeft.runs.files import RESULTS, RUN, WRITTEN, read_results, read_run
from sparsepeft.tuners.card import THIS_FOLDER

_PEFT_TEMPLATE = "[More Information Needed]"  # stands in the card that PEFT writes, which says nothing
_FILES = ("train_file", "validation_file", "test_file", "output_dir")
_OWN = ("data_dir", "device")  # of the machine that trained


def check_repo_id(repo_id: str) -> None:
    """See that a repository can have this name.

    Raises:
        UserError: it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot be a repository's name ({first_line(error)}); pass user/name, or name for your own."
        ) from error


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a finished run: weights, card, results and settings, in which paths of this machine become names.

    Args:
        repo_id: ``user/name``, or ``name`` for the user whose token is set up; made if there is no such repository.
        private: make it private; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        UserError: the folder holds no finished run, or there can be no such repository.
        RunFailed: the hub cannot be reached, or refuses; the run is left as it is.
    """
    folder = Path(folder)
    read_run(folder)
    check_repo_id(repo_id)
    api = HfApi()
    try:
        if constants.is_offline_mode():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        if get_token() is None:
            raise ConnectionError("there is no token; log in by `hf auth login`, or set HF_TOKEN")
        repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.create_commit(
            repository.repo_id,
            [CommitOperationAdd(name, content) for name, content in shared_files(folder, repository.repo_id).items()],
            commit_message="Run of sparsepeft",
        )
    except (OSError, HfHubHTTPError) as error:  # no network is an OSError, too
        raise RunFailed(
            f"The run in {folder} was not pushed to {repo_id} ({first_line(error)}); it is kept: repeat `sparsepeft "
            f"push {folder} {repo_id}{' --private' if private else ''}`."
        ) from error
    return str(repository)


def shared_files(folder: Path, repo_id: str) -> dict[str, bytes | Path]:
    """What of a run is uploaded, by name: the changed content, or the file itself."""
    paths = sorted({path for pattern in WRITTEN for path in folder.glob(pattern) if path.is_file()})
    files: dict[str, bytes | Path] = {path.name: path for path in paths}
    for name in files.keys() & {RUN, RESULTS, CONFIG_NAME}:
        content = read_results(folder) if name == RESULTS else json.loads((folder / name).read_text(encoding="utf-8"))
        if name != CONFIG_NAME:
            content = _public_run(content)
        elif content.get("base_model_name_or_path"):
            content["base_model_name_or_path"] = public_name(content["base_model_name_or_path"])
        files[name] = json.dumps(content, indent=2, ensure_ascii=False).encode()
    card = (folder / CARD).read_text(encoding="utf-8") if CARD in files else _PEFT_TEMPLATE
    if _PEFT_TEMPLATE in card:
        card = str(model_card(folder, json.loads((folder / RUN).read_text(encoding="utf-8")), read_results(folder)))
    return files | {CARD: card.replace(THIS_FOLDER, repo_id).encode()}


def _public_run(content: dict[str, Any]) -> dict[str, Any]:
    config = content["config"]
    public = {key: value and _name(value) for key, value in config.items() if key in _FILES}
    public |= {key: list(map(_name, value)) for key, value in config.items() if key in ("text", "validation_text")}
    public |= dict.fromkeys(config.keys() & set(_OWN))
    if config.get("model"):
        public["model"] = public_name(config["model"])
    return content | {"config": config | public}


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))
