"""A cluster that is not there, said in a sentence; what starts one is tested where it is used."""

from __future__ import annotations

import socket

import pytest

from sparsepeft.clusters import local_or
from sparsepeft.errors import UserError


def test_an_address_where_nobody_answers_is_said_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"No Ray cluster answers at `address={address}` "), local_or(address):
        pass
