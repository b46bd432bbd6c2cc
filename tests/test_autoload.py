"""Adapters in processes that import PEFT or transformers, and not this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparsepeft_autoload
from sparsepeft import SpartanConfig
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


# -- the hook by itself ----------------------------------------------------------------------------------------------

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
import threading
def load():
    from peft import PeftConfig
    found.append(type(PeftConfig.from_pretrained({str(tmp_path)!r})).__name__)
def name():
    from sparsepeft import SpartanConfig
    found.append(SpartanConfig.__name__)
found, threads = [], [threading.Thread(target=each) for each in 4 * (load, name)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), *set(found))
"""
    assert run("-c", code, PYTHONPATH=str(ROOT / "src")) == "8 SpartanConfig"


# -- installed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that this package was installed into as its users do."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    # What this environment has, without what its own .pth files do.
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    editable = ["--editable"] if request.param == "editable" else []
    run("-m", "pip", "--python", python, "install", *options, *editable, source)
    return python


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """The folder of a SPARTAN adapter, with a tokenizer, as a pipeline takes it."""
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_pretrained(tiny_backbone)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(backbone, SpartanConfig(task_type="SEQ_CLS", id2label={0: "no", 1: "yes"})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone).save_pretrained(folder)
    return folder


WAYS = {
    "PeftModel": """
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
backbone = AutoModelForSequenceClassification.from_pretrained({backbone!r})
print(PeftModel.from_pretrained(backbone, {adapter!r}).peft_type.value)
""",
    "AutoPeftModel": """
from peft import AutoPeftModelForSequenceClassification
print(AutoPeftModelForSequenceClassification.from_pretrained({adapter!r}).peft_type.value)
""",
    "pipeline": """
from transformers import pipeline
answer = pipeline("text-classification", model={adapter!r})("a text")
print("SPARTAN" if answer[0]["label"] in ("no", "yes") else answer)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "way"),
    [("wheel", "PeftModel"), ("wheel", "pipeline"), ("editable", "AutoPeftModel")],
    indirect=["installed"],
)
def test_an_adapter_is_loaded_without_importing_the_package(installed, adapter, tiny_backbone, way: str) -> None:
    code = WAYS[way].format(adapter=str(adapter), backbone=str(tiny_backbone))
    assert run(installed, "-c", code) == "SPARTAN"


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["wheel", "editable"], indirect=True)
def test_it_can_be_switched_off_is_uninstalled_and_does_not_mind_a_lost_source(installed, adapter) -> None:
    hook = "import sys; print('sparsepeft_autoload' in sys.modules)"
    assert run(installed, "-c", hook) == "True"
    assert run(installed, "-c", hook, SPARSEPEFT_AUTOLOAD="0") == "False"
    where = Path(run(installed, "-c", "import sparsepeft_autoload; print(sparsepeft_autoload.__file__)"))
    where.rename(where.with_suffix(".gone"))
    assert run(installed, "-c", hook) == "False"
    where.with_suffix(".gone").rename(where)
    run("-m", "pip", "--python", installed, "uninstall", "--quiet", "--yes", "sparsepeft")
    assert run(installed, "-c", hook) == "False"
    assert not list(Path(sysconfig.get_path("purelib", vars={"base": str(installed.parent.parent)})).glob("sparse*"))
