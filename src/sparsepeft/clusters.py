"""A Ray cluster to work on: a running one, or one of this machine alone, for as long as it is used."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from sparsepeft.errors import UserError, first_line
from sparsepeft.extras import require

# Ray asks for these when it is imported or started; workers on this machine inherit them.
_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # what asks for no GPU sees none
    "RAY_worker_register_timeout_seconds": "300",  # PyTorch takes its time to load on a busy machine
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_SECONDS = 10.0
_STARTS = 3


@contextlib.contextmanager
def local_or(address: str | None = None, purpose: str = "A cluster", **settings: Any) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine; what was started here is stopped at the end.

    A process that is already connected stays so, and uses that cluster.

    Args:
        address: of a running cluster: ``"HOST:6379"``, ``"ray://HOST:10001"``, or ``"auto"`` for one that this
            machine belongs to; None starts one.
        purpose: what needs the cluster; begins the sentence where Ray is missing.
        **settings: of ``ray.init`` where one is started, such as ``num_cpus``.

    Yields:
        The module ``ray``.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    ray = require("ray", "ray", purpose)
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    is_connected = ray.is_initialized()
    try:
        if address is not None:
            _check_answers(address)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
            if not is_connected and address is None:
                _start(ray, settings)
            elif not is_connected:
                ray.init(address, **_QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        where = "was started on this machine" if address is None else f"answers at `address={address}`"
        raise UserError(
            f"No Ray cluster {where} ({first_line(error)}); start one by `ray start --head`, and pass its address."
        ) from error
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)  # which Ray has taken
    try:
        yield ray
    finally:
        if not is_connected:
            ray.shutdown()


def check_room(ray: Any, address: str | None, **needed: float) -> None:
    """See that one piece of work finds its place on this machine; a running one may still grow.

    Args:
        ray: as :func:`local_or` yields it.
        address: that it was given.
        needed: parameters that say how many CPUs and GPUs it needs, such as ``cpus_per_trial`` and ``gpus_per_trial``.

    Raises:
        UserError: it does not.
    """
    has = ray.cluster_resources()
    for name, wanted in needed.items():
        found = has.get(name[:3].upper(), 0)
        if address is None and wanted > found:
            raise UserError(
                f"`{name}={wanted:g}` was given, but this machine has {found:g}; pass fewer, or the `address` of a "
                "cluster that has more."
            )


def _start(ray: Any, settings: dict[str, Any]) -> None:
    """Start a cluster; again where the machine is so busy that its parts do not find each other within Ray's 30 s."""
    for attempt in range(1, _STARTS + 1):
        try:
            ray.init("local", include_dashboard=False, **_QUIET, **settings)
            return
        except Exception as error:  # Ray raises nothing more specific here
            ray.shutdown()
            if attempt == _STARTS:
                raise RuntimeError(first_line(error)) from error


def _check_answers(address: str) -> None:
    """See that something listens at an address, which Ray would wait minutes for; any other word is left to Ray."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
