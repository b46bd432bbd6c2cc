"""Emulated devices: the limits hold, in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsepeft.errors import UserError
from sparsepeft_research.benchmarks.devices import DEVICES, emulate

_CHILD = """
import dataclasses, json, os, sys
from pathlib import Path
import numpy
from sparsepeft_research.benchmarks.devices import emulate
emulation = emulate(sys.argv[1], Path(sys.argv[2]))
try:
    numpy.empty(int(sys.argv[3]), dtype=numpy.uint8)
    refused = False
except MemoryError:
    refused = True
cores = len(os.sched_getaffinity(0))
print(json.dumps(dataclasses.asdict(emulation) | {"refused": refused, "cores": cores, "pid": os.getpid()}))
"""


def _emulated(name: str, cgroups: Path, allocate: int) -> dict:
    arguments = [sys.executable, "-c", _CHILD, name, str(cgroups), str(allocate)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "fits"), [("raspberry-pi-4", True), ("iphone-11", False)])
def test_memory_and_cores_are_limited(name: str, fits: bool, tmp_path: Path) -> None:
    device = DEVICES[name]
    found = _emulated(name, tmp_path, device.memory_bytes // 2 if fits else device.memory_bytes)
    assert found["refused"] is not fits
    assert found["memory_limit"] == "rlimit"
    assert found["cores"] == found["num_cores"] == min(device.num_cores, len(os.sched_getaffinity(0)))
    said = " ".join(found["not_emulated"])
    assert device.processor in said
    assert ("core(s), the device" in said) == (found["cores"] < device.num_cores)


def test_a_cgroup_is_used_where_one_can_be_made(tmp_path: Path) -> None:
    """On a folder that looks like a mounted cgroup tree: making a real one needs rights that few machines give."""
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    (tmp_path / own.lstrip("/")).mkdir(parents=True, exist_ok=True)
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids")
    found = _emulated("iphone-11", tmp_path, 5 << 30)
    assert found["memory_limit"] == "cgroup"
    assert not found["refused"]
    group = tmp_path / f"sparsepeft-{found['pid']}"
    assert (group / "memory.max").read_text() == str(4 << 30)
    assert (group / "cgroup.procs").read_text() == str(found["pid"])


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'raspberry-pi-4'"):
        emulate("raspberry-pi-5")
