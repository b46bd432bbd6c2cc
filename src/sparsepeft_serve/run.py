"""Starting a service."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from sparsepeft.devices import find_device, keep_freed_memory
from sparsepeft.errors import UserError
from sparsepeft.inference import MultiTaskEngine
from sparsepeft.inference.folders import backbone_of_tasks, named_tasks
from sparsepeft.runs.files import RUN
from sparsepeft_serve.app import create_app
from sparsepeft_serve.folder import signatures
from sparsepeft_serve.protocol import HeadTimeoutProtocol
from sparsepeft_serve.service import check_weights_format
from sparsepeft_serve.settings import ServeSettings

logger = logging.getLogger(__name__)

_STOP_SECONDS = 60


def read_tasks(named: Sequence[str], tasks_dir: Path | None) -> dict[str, Path]:
    """The folder of each task, by name: those named, and all in the tasks folder; else the demo's, trained if need be.

    Args:
        named: ``NAME=FOLDER`` each.
        tasks_dir: see :class:`ServeSettings`.

    Raises:
        UserError: a name without a folder, or twice; or no tasks folder.
    """
    tasks = named_tasks(named, tasks_dir)
    if tasks or tasks_dir is not None:
        return tasks
    from sparsepeft.training import demo, train

    config = demo.demo_config("spartan")
    if not (Path(config.output_dir) / RUN).is_file():
        print("No task was named: training the demo's (topics of short texts, about a minute) ...", file=sys.stderr)
        train(config)
    return {demo.TASK: Path(config.output_dir)}


def load_engine(
    tasks: Mapping[str, Path],
    model: str | None,
    tasks_dir: Path | None = None,
    *,
    dtype: str,
    token_budget: int,
    device: str | None = None,
) -> MultiTaskEngine:
    """An engine with the tasks; without a ``model`` on the backbone that the first of them was trained on.

    A task in the tasks folder that cannot be loaded is told in the log and left out.

    Args:
        device: where to compute; None is the accelerator, if there is one, else the CPU.

    Raises:
        UserError: the backbone, or a task outside the tasks folder, cannot be loaded, or there is no such device.
    """
    found = str(find_device(device))
    engine = MultiTaskEngine(backbone_of_tasks(tasks, model), dtype=dtype, device=found, token_budget=token_budget)
    for name, path in tasks.items():
        try:
            check_weights_format(path)
            engine.add(name, path)
        except UserError as error:
            if path.parent != tasks_dir:
                raise
            logger.warning("task %s: left out: %s", name, error)
    return engine


def serve(
    tasks: Mapping[str, Path],
    model: str | None,
    settings: ServeSettings,
    *,
    host: str,
    port: int,
    dtype: str,
    token_budget: int,
    threads: int | None,
    device: str | None,
) -> None:
    """Answer until a signal comes; what was taken by then is answered.

    Raises:
        UserError: the engine cannot be made, there is no such device, or the default task is none of its tasks.
    """
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    found = None if settings.tasks_dir is None else signatures(settings.tasks_dir)  # before any is loaded
    engine = load_engine(tasks, model, settings.tasks_dir, dtype=dtype, token_budget=token_budget, device=device)
    if settings.default_task is not None and settings.default_task not in engine.tasks:
        raise UserError(
            f"--default-task {settings.default_task} was given, but the tasks are {', '.join(engine.tasks) or 'none'}."
        )
    logging.getLogger("sparsepeft_serve").setLevel(logging.INFO)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        create_app(engine, settings, loaded=found),
        host=host,
        port=port,
        http=HeadTimeoutProtocol,
        access_log=False,
        log_config=None,
        log_level="warning",
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = _Server(config)
    server.greeting = f"{engine!r} answers at http://{shown}:"
    server.run()
    if not server.started:
        raise UserError(
            f"The address {shown}:{port} cannot be used; another program may have it: choose another --port."
        )


class _Server(uvicorn.Server):
    """Says where it answers, once it does."""

    greeting = ""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"{self.greeting}{port}", file=sys.stderr, flush=True)
