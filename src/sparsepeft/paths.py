"""Paths as they are stored: absolute, so that what was made with them can be used from any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsepeft.backbones import DEFAULT_NAME

_PATHS = ("data_dir", "train_file", "validation_file", "test_file")
_LISTS = ("text", "validation_text")


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same from every folder.

    Links stay as they are: what they point to may lack the ending that says a file's format, or move.
    """
    return os.path.abspath(os.path.expanduser(path))


def absolute_model(name: str | None) -> str | None:
    """The name of a model: a local folder's path, absolute; anything else (a hub id, None) as it is."""
    if not name or name == DEFAULT_NAME or not Path(name).expanduser().is_dir():
        return name
    return absolute(name)


def with_absolute_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values with the paths among them (files, data folder, a local model) absolute."""
    values = dict(config)
    for name in _PATHS:
        if values.get(name) is not None:
            values[name] = absolute(values[name])
    for name in _LISTS:
        if name in values:
            files = values[name] or []
            values[name] = [absolute(file) for file in ([files] if isinstance(files, (str, os.PathLike)) else files)]
    if "model" in values:
        values["model"] = absolute_model(values["model"])
    return values


def without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values for a file that is passed on: of own files the names only."""
    values = dict(config)
    for name in _PATHS:
        if values.get(name) is not None:
            values[name] = Path(values[name]).name
    return values
