"""What a service is started with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from sparsepeft.arguments import check_number, check_whole
from sparsepeft.errors import UserError

LONGEST_WAIT_MS, QUEUE_SIZE = 1.0, 2048
BATCH_SIZE, BODY_BYTES, BODY_SECONDS = 512, 2_000_000, 30.0
_LEAST_TOKEN = 16


@dataclass(frozen=True)
class ServeSettings:
    """How a service answers, and what it refuses.

    Args:
        longest_wait_ms: how long a text may wait for others to be batched with; while a batch is computed, those that
            come gather anyway.
        queue_size: texts that may wait, those of all callers together; past it a request gets 429.
        max_client_batch_size: texts of a request.
        payload_limit: bytes of a request's body.
        body_timeout: seconds in which a request's body has to arrive.
        tokens: that a caller may show, as ``Authorization: Bearer TOKEN``; any caller is answered where there are none.
        admin_tokens: that allow tasks to be loaded and removed; nobody may where there are none.
        tasks_dir: whose folders are tasks, and the only place that tasks are loaded from.
        default_task: that a request without a task's name is for; None is the only one, if there is one.
    """

    longest_wait_ms: float = LONGEST_WAIT_MS
    queue_size: int = QUEUE_SIZE
    max_client_batch_size: int = BATCH_SIZE
    payload_limit: int = BODY_BYTES
    body_timeout: float = BODY_SECONDS
    tokens: tuple[str, ...] = field(default=(), repr=False)
    admin_tokens: tuple[str, ...] = field(default=(), repr=False)
    tasks_dir: Path | None = None
    default_task: str | None = None

    def __post_init__(self) -> None:
        for name in ("queue_size", "max_client_batch_size", "payload_limit"):
            check_whole(name, getattr(self, name))
        for name in ("longest_wait_ms", "body_timeout"):
            check_number(name, getattr(self, name), least=0)


def read_tokens(file: Path) -> tuple[str, ...]:
    """The tokens of a file, one in each line.

    Raises:
        UserError: it cannot be read, or has none, or one that is too short.
    """
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The token file {file} cannot be read ({error}); pass a text file with a token.") from error
    if not lines:
        raise UserError(f"The token file {file} is empty; write a token into it, such as `openssl rand -hex 32` makes.")
    shortest = min(map(len, lines))
    if shortest < _LEAST_TOKEN:
        raise UserError(
            f"The token file {file} has a token of {shortest} characters; use at least {_LEAST_TOKEN}, such as "
            "`openssl rand -hex 32` makes."
        )
    return tuple(lines)


def check_host(host: str, tokens: tuple[str, ...]) -> None:
    """Refuse an address that others can reach where anybody would be answered.

    Raises:
        UserError: it is one, and there are no tokens.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and not tokens:
        raise UserError(
            f"--host {host} can be reached from other machines, but no --token-file says who may ask; pass one, or "
            "--host 127.0.0.1."
        )
