"""The package as its users install it: the bare wheel among nothing but what it requires, and editable."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsepeft import SpartanConfig
from tests.test_autoload import ROOT, run

pytestmark = pytest.mark.slow


def required() -> set[str]:
    """The distributions that ``pip install sparsepeft`` brings, as their metadata says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting, names = list(project["dependencies"]), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name not in names and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            names.add(requirement.name)
            waiting += importlib.metadata.requires(requirement.name) or []
    return names


def link_required(folder: Path) -> None:
    """Fill a folder with links to the distributions that are required, and to no others."""
    folder.mkdir()
    for name in required():
        for file in importlib.metadata.files(name) or []:
            top = folder / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(importlib.metadata.distribution(name).locate_file(file.parts[0]))


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the package and what it requires, which no extra was asked for."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    link_required(folder / "required")
    (site_packages / "required.pth").write_text(str(folder / "required"))
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


BARE = """
import importlib, pkgutil, subprocess, sys
for name in ("datasets", "sklearn", "scipy", "pandas", "matplotlib", "onnx"):
    assert importlib.util.find_spec(name) is None, name

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from sparsepeft import MultiTaskEngine, SpartanConfig

tokenizer = AutoTokenizer.from_pretrained({backbone!r})
load = lambda: AutoModelForSequenceClassification.from_pretrained({backbone!r})
texts, labels = ["the striker scored twice", "the bank cut its rates"], torch.tensor([0, 1])
batch = tokenizer(texts, padding=True, return_tensors="pt")
config = SpartanConfig(num_parents=6, num_children=2, top_k=3, task_type="SEQ_CLS", id2label={{0: "sport", 1: "money"}})
model = get_peft_model(load(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(30):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 4, losses
model.eval().save_pretrained({folder!r})
expected = model(**batch).logits.softmax(-1)
again = PeftModel.from_pretrained(load(), {folder!r}).eval()(**batch).logits.softmax(-1)
torch.testing.assert_close(again, expected)
answers = MultiTaskEngine({backbone!r}, {{"topics": {folder!r}}}).predict([("topics", text) for text in texts])
assert [answer.label for answer in answers] == ["sport", "money"]
torch.testing.assert_close(torch.tensor([[*answer.scores.values()] for answer in answers]), expected.detach())

import sparsepeft
for module in pkgutil.walk_packages(sparsepeft.__path__, "sparsepeft."):
    if "triton" not in module.name and not module.name.startswith("sparsepeft.export.run"):
        importlib.import_module(module.name)
print("fine")
"""


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_a_bare_wheel_trains_saves_and_loads(installed: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    code = BARE.format(backbone=str(tiny_backbone), folder=str(tmp_path / "adapter"))
    assert run(installed, "-c", code) == "fine"


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
@pytest.mark.parametrize(
    ("hidden", "sentence"),
    [
        ("none", 'Loading a task\'s data needs datasets, which is not installed; run pip install "sparsepeft[train]".'),
        ("typer", 'The command line needs typer, which is not installed; run pip install "sparsepeft[cli]".'),
    ],
)
def test_a_bare_wheel_names_the_extra_that_a_command_needs(
    installed: Path, tiny_backbone: Path, tmp_path: Path, hidden: str, sentence: str
) -> None:
    arguments = ["sparsepeft", "train", "--task=topics", f"--model={tiny_backbone}", f"--output-dir={tmp_path / 'o'}"]
    code = f"""
import contextlib, io, sys
sys.argv, sys.modules[{hidden!r}], said = {arguments}, None, io.StringIO()
from sparsepeft_cli import main
try:
    with contextlib.redirect_stderr(said): main()
except SystemExit as end: print(end.code, said.getvalue().splitlines()[-1])
"""
    assert run(installed, "-c", code) == f"2 Error: {sentence}"


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


@pytest.mark.parametrize(
    ("installed", "way"),
    [("wheel", "PeftModel"), ("wheel", "pipeline"), ("editable", "AutoPeftModel")],
    indirect=["installed"],
)
def test_an_adapter_is_loaded_without_importing_the_package(installed, adapter, tiny_backbone, way: str) -> None:
    code = WAYS[way].format(adapter=str(adapter), backbone=str(tiny_backbone))
    assert run(installed, "-c", code) == "SPARTAN"


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
