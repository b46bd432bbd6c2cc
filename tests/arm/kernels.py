"""``make test-arm``, its first half: the compiled kernels' own tests, with kernels that run on an emulated Cortex-A72.

    python -m tests.arm.kernels

The kernels are built for NEON by a cross compiler. The tests that name them run as ever, but the library they load is
one whose every call goes to a program on the emulated processor, with all the memory that the arguments point to.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsepeft.ops import native

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / ".arm"
OPS = ROOT / "src" / "sparsepeft" / "ops"
TESTS = ("memory", "sparse_attention", "sparse_attention_selection")


class EmulatedLibrary:
    """Looks like the ``ctypes.CDLL`` of a folder of sources; see ``native.load_library``."""

    def __init__(self, program: Path) -> None:
        self.memory_read = self._function(program, 0)
        self.sparse_attention_scratch_bytes = self._function(program, 0)
        self.sparse_attention_run = self._function(program, 1)
        self.sparse_attention_encode = self._function(program, 2)
        self.sparse_attention_select = self._function(program, 3)

    @staticmethod
    def _function(program: Path, number: int) -> Any:
        def call(arguments: Any, flag: Any = None) -> int:
            backward = flag.value if isinstance(flag, ctypes.c_int64) else 0
            output = flag.value if isinstance(flag, ctypes.c_void_p) else None
            return run(program, number, backward, arguments._obj, output)

        return call


def run(program: Path, function: int, backward: int, arguments: ctypes.Structure, output: int | None) -> int:
    """Call a kernel on the emulated processor; what it wrote is copied into this process's memory.

    ``output`` is an address that the kernel takes beside its arguments; it stands behind them.
    """
    storages = {s.data_ptr(): s.nbytes() for s in _storages()}
    blocks: dict[int, int] = {}
    patches = []
    content = bytearray(bytes(arguments)) + bytes(8)
    for at, address in (*_pointers(arguments), (len(content) - 8, output or 0)):
        content[at : at + 8] = bytes(8)
        begin = next((b for b, size in storages.items() if address and b <= address < b + size), None)
        if begin is not None:  # else null, or a function of this process
            patches.append((at, blocks.setdefault(begin, len(blocks)), address - begin))
    with tempfile.NamedTemporaryFile() as file:
        file.write(struct.pack("3q", function, backward, len(content)) + content + struct.pack("q", len(blocks)))
        for begin in blocks:
            file.write(struct.pack("2q", storages[begin], begin % 64) + ctypes.string_at(begin, storages[begin]))
        file.write(struct.pack("q", len(patches)) + b"".join(struct.pack("3q", *patch) for patch in patches))
        file.flush()
        emulator = ARM / "root" / "usr" / "bin" / "qemu-aarch64-static"
        subprocess.run([emulator, "-cpu", "cortex-a72", program, file.name], check=True)
        answer = Path(file.name).read_bytes()
    at = 8
    for begin in blocks:
        ctypes.memmove(begin, answer[at : at + storages[begin]], storages[begin])
        at += storages[begin]
    return int(struct.unpack_from("q", answer)[0])


@cache
def build(sources: Path) -> Path:
    """Return the program with the kernels of a folder of sources, built for the emulated processor."""
    program = ARM / f"{sources.parent.name}-kernels"
    flags = [flag for flag in native._FLAGS if flag not in ("-fPIC", "-shared")]
    subprocess.run(
        [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-mcpu=cortex_a72", "-static", *flags,
         f"-I{OPS / 'csrc'}", f'-DKERNEL="{sources / "kernel.cpp"}"',
         *(["-DIS_MEMORY"] if sources.parent.name == "memory" else []),
         str(Path(__file__).with_name("kernels.cpp")), "-o", str(program)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ARM / "zig")},
    )  # fmt: skip
    return program


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of pytest: let the kernels be those of the emulated processor."""
    native.load_library = lambda sources: EmulatedLibrary(build(sources))


def main() -> int:
    """Set up, run the tests; 0 if all passed."""
    setup = ["bash", str(Path(__file__).with_name("setup.sh")), str(ARM), sys.executable]
    if subprocess.run(setup).returncode:
        return 1
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in TESTS]
    # Not those of what is done where there are no kernels, nor of the selection by itself.
    names = "(compiled or cpu) and not refuses and not failing and not compile_"
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.arm.kernels", "-p", "no:xdist", "-k", names, *files],
        cwd=ROOT,
    ).returncode


def _pointers(structure: ctypes.Structure, base: int = 0) -> Iterator[tuple[int, int]]:
    for name, kind in structure._fields_:
        at, value = base + getattr(type(structure), name).offset, getattr(structure, name)
        if issubclass(kind, ctypes.Structure):
            yield from _pointers(value, at)
        elif kind is ctypes.c_void_p:
            yield at, value or 0


def _storages() -> Iterator[torch.UntypedStorage]:
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing.untyped_storage()


if __name__ == "__main__":
    sys.exit(main())
