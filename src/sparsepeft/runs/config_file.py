"""Reading a config: flags of the command line over a file.

A config file's keys are the options of ``sparsepeft train``, with ``_`` or ``-`` between words, and ``settings`` and
``spt`` for what ``--set`` and ``--spt-set`` give one by one. A finished run's ``run.json`` and ``results.json`` hold
the same keys under ``config``, and are config files, too: of the same run, but for the output folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparsepeft.errors import UserError, first_line, unknown_name
from sparsepeft.runs.config import LM, RunConfig, current_names, defaults_of, refuse_foreign_fields, require_fields
from sparsepeft.tasks.spec import CUSTOM


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 and JSON have it: ``1e-4`` is a number, which YAML 1.1 takes for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(flags: dict[str, Any], file: Path | None = None) -> RunConfig:
    """Combine command-line flags with a YAML or JSON file; mappings in both are joined.

    A setting that is called like a field of the config is that field: ``--set epochs=3`` is ``--epochs 3``.

    Args:
        flags: fields of :class:`RunConfig`, of which None means not given, but ``spt`` as whether it was asked for, and
            ``spt_set`` with its settings.
        file: in which ``spt`` is a mapping of settings.

    Raises:
        UserError: the file cannot be read or has unknown keys, a value is given twice, is for another kind of task or
            cannot be used, or one that is needed is missing.
    """
    values = {key: value for key, value in current_names(read_config(file)).items() if value is not None}
    valid = defaults_of(RunConfig)
    for key in values:
        if key not in valid:
            raise UserError(f"{file}: " + unknown_name("config key", str(key), valid))
    from_flags = {key: value for key, value in flags.items() if value is not None}
    is_sparse, spt_settings = from_flags.pop("spt", False), from_flags.pop("spt_set", {})
    if spt_settings and not is_sparse and "spt" not in values:
        raise UserError("`spt_set` was given without `spt`; pass `spt` as well to make the model sparse.")
    if is_sparse or spt_settings:
        from_flags["spt"] = spt_settings
    if (from_flags.get("task") or values.get("task")) == LM:
        from_flags.pop("data_dir", None)  # it may come from the environment, where it is meant for other tasks
    for key, value in from_flags.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    settings = values.get("settings")
    if isinstance(settings, dict):
        fields = {key: settings[key] for key in sorted(settings.keys() & valid.keys())}
        for key in fields:
            if key in values:
                raise UserError(f"`{key}` was given both as a setting and as an option; give it once.")
        values |= fields | {"settings": {key: value for key, value in settings.items() if key not in fields}}
    if values.get("train_file") and not values.get("task"):
        values["task"] = CUSTOM
    refuse_foreign_fields(values.get("task"), values)
    require_fields(values)
    return RunConfig(**values)


def read_config(file: Path | None, name: str = "config") -> dict[str, Any]:
    """The values in a YAML or JSON config file, by the names of the config's fields; empty without a file.

    Args:
        file: to be read.
        name: of the parameter that it was given as.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if file is None:
        return {}
    if not file.is_file():
        raise UserError(f"The config file {file} does not exist; pass an existing YAML or JSON file as `{name}`.")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError also for what is not UTF-8
        raise UserError(f"{file} is not valid YAML or JSON ({first_line(error)}); correct it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); pass another `{name}`.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds {type(values).__name__}, but a config file is a mapping of keys to values.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if isinstance(values.get("config"), dict) and "format_version" in values:
        return {key: value for key, value in values["config"].items() if key != "output_dir"}
    return values


def parse_settings(pairs: list[str], option: str = "--set", example: str = "top_k=4") -> dict[str, Any]:
    """``["top_k=4", "temperature=1.6"]`` -> ``{"top_k": 4, "temperature": 1.6}``; values are read as YAML.

    Raises:
        UserError: one is no pair, or its value is malformed.
    """
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.strip():
            raise UserError(
                f"{option} {pair!r} was given, but settings have the form key=value, for example {option} {example}."
            )
        try:
            settings[key.strip()] = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError for what looks like a date and is none
            raise UserError(
                f"{option} {pair!r} was given, but {value!r} cannot be read as a value ({first_line(error)}); quote "
                f"it as YAML does, for example {option} {example}."
            ) from error
    return settings
