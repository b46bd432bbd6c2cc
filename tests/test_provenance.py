"""Where results come from."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from sparsepeft import provenance
from sparsepeft.provenance import OtherLoad

pytestmark = pytest.mark.skipif(provenance.cpu_ticks() is None, reason="this system does not tell its load")


def test_other_processes_count_and_this_one_does_not() -> None:
    load, end = OtherLoad(), time.monotonic() + 1
    while time.monotonic() < end:
        pass
    alone = load.share()
    burn = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    load, process = OtherLoad(), subprocess.Popen([sys.executable, "-c", burn])
    process.wait()
    beside = load.share()
    assert alone is not None
    assert beside is not None
    assert 0 <= alone <= 1
    assert 0 < beside <= 1


def test_nothing_is_claimed_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "cpu_ticks", lambda: None)
    assert OtherLoad().share() is None
