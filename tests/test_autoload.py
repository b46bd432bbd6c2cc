"""Adapters in processes that import PEFT or transformers, and not this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsepeft_autoload
from sparsepeft.tuners import config as _registry

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environment: str) -> str:
    """What Python prints in a fresh process without this one's path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = [] if isinstance(command[0], Path) else [sys.executable]
    done = subprocess.run(
        [*python, *map(str, command)], capture_output=True, text=True, env=inherited | environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.strip()


INSTALL = "import sys, sparsepeft_autoload; sparsepeft_autoload.install()\n"
MAPPING = "PEFT_TYPE_TO_CONFIG_MAPPING = {'HEAD': 'its own'}\n"
NAMES = "print(*(f'{name}:{type(entry).__name__}' for name, entry in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()))\n"


def run_with(folder: Path, code: str, mapping: str = MAPPING) -> str:
    """What ``code`` prints where `peft` is a package with nothing but a registry, and no other package is installed."""
    (folder / "peft").mkdir()
    (folder / "peft" / "__init__.py").write_text("from peft.mapping import *")
    (folder / "peft" / "mapping.py").write_text(mapping)
    archive = shutil.make_archive(str(folder / "zipped"), "zip", folder, "peft")
    path = archive if "zip" in folder.name else str(folder)
    return run("-S", "-c", code, PYTHONPATH=os.pathsep.join([path, str(ROOT / "src")]))


def test_the_names_are_those_of_the_methods() -> None:
    methods = {value for value in vars(_registry).values() if isinstance(value, _registry.MethodName)}
    assert methods == set(sparsepeft_autoload.METHODS)


def test_waiting_for_peft_imports_nothing(tmp_path) -> None:
    code = f"import sys; before = set(sys.modules)\n{INSTALL}print(sorted(set(sys.modules) - before))"
    assert run_with(tmp_path, code) == "['sparsepeft_autoload']"


@pytest.mark.parametrize("order", [INSTALL + "import peft", "import peft\n" + INSTALL, 2 * INSTALL + "import peft"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_importing_peft_registers_the_methods_and_imports_nothing_more(tmp_path, order: str, kind: str) -> None:
    (tmp_path / kind).mkdir()
    code = f"""{order}
{NAMES}
hasattr(peft.PEFT_TYPE_TO_CONFIG_MAPPING["SPARTAN"], "__wrapped__")
assert "sparsepeft" not in sys.modules
assert type(peft.mapping.__loader__) is type(peft.mapping.__spec__.loader) is type(peft.__loader__)
"""
    deferred = "SPARTAN:DeferredConfig BOTTLENECK:DeferredConfig BITFIT:DeferredConfig"
    assert run_with(tmp_path / kind, code) == f"HEAD:str {deferred}"


@pytest.mark.parametrize(
    ("mapping", "printed"),
    [
        ("raise ImportError('broken')", "broken\nbroken"),
        ("import sys\nif not hasattr(sys, 'once'): sys.once = 1; raise ImportError('broken')\n" + MAPPING, "broken\n4"),
        ("PEFT_TYPE_TO_CONFIG_MAPPING = None\nraise ModuleNotFoundError('gone')", "gone\ngone"),
    ],
)
def test_a_peft_that_cannot_be_imported_fails_as_it_would(tmp_path, mapping: str, printed: str) -> None:
    attempt = "try: import peft; print(len(peft.PEFT_TYPE_TO_CONFIG_MAPPING))\nexcept ImportError as e: print(e)\n"
    assert run_with(tmp_path, INSTALL + attempt + attempt, mapping) == printed


def test_a_peft_without_the_registry_is_left_alone(tmp_path) -> None:
    assert run_with(tmp_path, INSTALL + "import peft; print(peft.other)", "other = 1") == "1"


@pytest.mark.slow
def test_threads_that_import_peft_and_the_package_at_once(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SPARTAN"}', encoding="utf-8")
    code = f"""{INSTALL}
import threading, traceback
def load():
    from peft import PeftConfig
    return type(PeftConfig.from_pretrained({str(tmp_path)!r}))
def name():
    from sparsepeft import SpartanConfig
    return SpartanConfig
def note(get):
    try: found.append(get().__name__)
    except Exception: found.append(traceback.format_exc())
found, threads = [], [threading.Thread(target=note, args=[each]) for each in 4 * (load, name)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), *set(found))
"""
    assert run("-c", code, PYTHONPATH=str(ROOT / "src")) == "8 SpartanConfig"
