"""The limits of an edge device, set on this process.

The paper emulates its devices in the same way (arXiv:2211.16634, appendix F): their number of cores and their memory,
on a server's processor. What that leaves out is said with each emulation.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from sparsepeft.errors import UserError, unknown_name

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Device:
    """An edge device.

    Attributes:
        title: its name in words.
        num_cores: cores of its processor.
        memory_bytes: its main memory.
        processor: what is not emulated.
    """

    title: str
    num_cores: int
    memory_bytes: int
    processor: str


DEVICES = {
    "raspberry-pi-4": Device("Raspberry Pi 4", 4, 8 << 30, "ARM Cortex-A72, 1.5 GHz"),
    "iphone-11": Device("iPhone 11", 6, 4 << 30, "Apple A13 (ARM), 2 cores at 2.65 GHz and 4 at 1.8 GHz"),
}


@dataclass(frozen=True)
class Emulation:
    """What was limited, and how.

    Attributes:
        device: its name.
        num_cores: cores this process may use now; the device's, or fewer if there are fewer.
        memory_bytes: the limit of this process.
        memory_limit: ``"cgroup"`` (resident memory) or ``"rlimit"`` (private writable memory, also where untouched).
        not_emulated: one sentence for each thing that differs from the device.
    """

    device: str
    num_cores: int
    memory_bytes: int
    memory_limit: str
    not_emulated: tuple[str, ...]


def emulate(name: str, cgroups: Path = _CGROUPS) -> Emulation:
    """Limit this process, and the processes it starts, to a device's cores and memory, until it ends.

    Memory is limited by a cgroup (version 2) where this process may make one, else by ``RLIMIT_DATA``: of the limits of
    a process it is the one that leaves out mapped files and libraries, which take gigabytes of addresses but no memory.

    Args:
        name: one of :data:`DEVICES`.
        cgroups: where cgroups are mounted.

    Raises:
        UserError: the device is unknown, or the system is not Linux.
    """
    if name not in DEVICES:
        raise UserError(unknown_name("The device", name, DEVICES))
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"The device {name!r} can be emulated on Linux only, and this is {platform.system()}.")
    device = DEVICES[name]
    cores = sorted(os.sched_getaffinity(0))[: device.num_cores]
    for thread in Path("/proc/self/task").iterdir():  # a library may have started threads already
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)
    notes = [f"The processor is this machine's {platform.machine()} and not the device's ({device.processor})."]
    if len(cores) < device.num_cores:
        notes.append(f"This process has {len(cores)} core(s), the device {device.num_cores}.")
    memory_limit = "cgroup"
    if not _limit_by_cgroup(device.memory_bytes, cgroups):
        memory_limit = "rlimit"
        resource.setrlimit(resource.RLIMIT_DATA, (device.memory_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        notes.append("No cgroup could be made, so each process has the device's memory for itself.")
    return Emulation(name, len(cores), device.memory_bytes, memory_limit, tuple(notes))


def _limit_by_cgroup(memory_bytes: int, root: Path) -> bool:
    """Move this process into a cgroup of its own with so much memory; whether that was possible."""
    try:
        group_path = next(
            line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return False
    former = root / group_path.strip().lstrip("/")
    # A cgroup that holds processes cannot hand its memory on to cgroups below it; one above may.
    for parent in [former, *former.parents]:
        try:
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                continue
            group = parent / f"sparsepeft-{os.getpid()}"
            group.mkdir()
        except OSError:
            continue
        try:
            (group / "memory.max").write_text(str(memory_bytes))
            if (group / "memory.swap.max").exists():
                (group / "memory.swap.max").write_text("0")
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            _remove(group)
            continue
        atexit.register(_leave, group, former)
        return True
    return False


def _leave(group: Path, former: Path) -> None:
    with contextlib.suppress(OSError):
        (former / "cgroup.procs").write_text(str(os.getpid()))
    _remove(group)


def _remove(group: Path) -> None:
    with contextlib.suppress(OSError):
        group.rmdir()
