"""Reading a config file.

Its keys are the options of ``sparsepeft train``, with ``_`` or ``-`` between words, and ``settings`` and ``spt`` for
what ``--set`` and ``--spt-set`` give one by one. A finished run's ``run.json`` and ``results.json`` hold the same keys
under ``config``, and are config files, too: of the same run, but for the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparsepeft.errors import UserError, first_line


def read_config(file: Path | None) -> dict[str, Any]:
    """The values in a YAML or JSON config file, by the names of the config's fields; empty without a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if file is None:
        return {}
    if not file.is_file():
        raise UserError(f"The config file {file} does not exist; pass an existing YAML or JSON file as `config`.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # a ValueError also for what is not UTF-8
        raise UserError(f"{file} is not valid YAML or JSON ({first_line(error)}); correct it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); pass another `config`.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds {type(values).__name__}, but a config file is a mapping of keys to values.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if isinstance(values.get("config"), dict) and "format_version" in values:
        return {key: value for key, value in values["config"].items() if key != "output_dir"}
    return values
