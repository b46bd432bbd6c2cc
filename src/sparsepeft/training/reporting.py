"""Trackers of experiments that transformers can report to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from sparsepeft.errors import UserError, unknown_name


def read_trackers(values: Any) -> tuple[str, ...]:
    """Names of trackers from a config: ``"a,b"``, a list of such, ``"none"`` or None."""
    parts = [values] if isinstance(values, str) else values or ()
    if not isinstance(parts, Iterable) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"`report_to={values!r}` was given; expected names such as tensorboard, or none.")
    names = dict.fromkeys(name.strip() for part in parts for name in part.split(","))
    return tuple(name for name in names if name not in ("", "none"))


def make_reporters(trackers: Iterable[str], logs: Path) -> list[TrainerCallback]:
    """A callback for each tracker.

    Args:
        trackers: by transformers' names; ``"all"`` stands for those that are installed.
        logs: folder for TensorBoard's files; other trackers have places of their own.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    reporters = []
    for name in installed if "all" in trackers else trackers:
        if name not in known:
            raise UserError(unknown_name("`report_to`", name, [*known, "all", "none"]))
        try:
            reporter = known[name]()
        except (ImportError, RuntimeError, ValueError) as error:
            lack = str(error).partition(". ")[0]
            raise UserError(
                f"`report_to={name}` was given, but {lack}; install it, or leave `report_to` out."
            ) from error
        if isinstance(reporter, integration_utils.TensorBoardCallback):
            reporter.logging_dir = str(logs)
        reporters.append(reporter)
    return reporters
