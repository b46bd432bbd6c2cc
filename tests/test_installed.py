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
from tests.fixtures.test_before import BACKBONE
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


def install(folder: Path, *options: str) -> Path:
    """The Python of an environment with the package, for which no extra was asked, and what it requires."""
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "venv", "--without-pip", folder / "env")
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    link_required(folder / "required")
    (site_packages / "required.pth").write_text(str(folder / "required"))
    quickly = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run("-m", "pip", "--python", python, "install", *quickly, *options, source)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("editable"), "--editable")


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
import importlib.util, pkgutil, sys
for name in ("datasets", "sklearn", "scipy", "pandas", "matplotlib", "onnx"):
    assert importlib.util.find_spec(name) is None, name

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from sparsepeft import MultiTaskEngine, SpartanConfig

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained({backbone!r})
load = lambda: AutoModelForSequenceClassification.from_pretrained({backbone!r})
texts, labels = ["a fine film", "the ending was very poor"], torch.tensor([0, 1])
batch = tokenizer(texts, padding=True, return_tensors="pt")
config = SpartanConfig(num_parents=6, num_children=2, top_k=3, task_type="SEQ_CLS", id2label={{0: "good", 1: "bad"}})
model = get_peft_model(load(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
losses = []
for _ in range(30):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.1 < losses[0], losses
model.eval().save_pretrained({folder!r})
expected = model(**batch).logits.softmax(-1)
again = PeftModel.from_pretrained(load(), {folder!r}).eval()(**batch).logits.softmax(-1)
torch.testing.assert_close(again, expected)
answers = MultiTaskEngine({backbone!r}, {{"films": {folder!r}}}).predict([("films", text) for text in texts])
assert [answer.label for answer in answers] == ["good", "bad"]
torch.testing.assert_close(torch.tensor([[*answer.scores.values()] for answer in answers]), expected.detach())

import sparsepeft
for module in pkgutil.walk_packages(sparsepeft.__path__, "sparsepeft."):
    needs_more = any(part in module.name for part in ("triton", "sweeps.scheduler", "sweeps.watching", "sweeps.worker"))
    if not needs_more and not module.name.startswith("sparsepeft.export.run"):
        importlib.import_module(module.name)

def command(*arguments):
    import contextlib, io
    from sparsepeft_cli import main
    sys.argv, said = ["sparsepeft", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(said): main()
    except SystemExit as end:
        return end.code, said.getvalue().splitlines()[-1]
hint = "{{}} needs {{}}, which is not installed; run pip install \\"sparsepeft[{{}}]\\"."
given = "train", "--task=topics", "--model={backbone}", "--output-dir={folder}/run"
assert command(*given) == (2, "Error: " + hint.format("Training", "datasets", "train"))
sys.modules["typer"] = None
del sys.modules["sparsepeft_cli.app"]
assert command("--help") == (2, "Error: " + hint.format("The command line", "typer", "cli"))
print("fine")
"""


def test_a_bare_wheel_trains_saves_and_loads_and_says_what_more_needs(wheel: Path, tmp_path: Path) -> None:
    code = BARE.format(backbone=str(BACKBONE), folder=str(tmp_path / "adapter"))
    assert run(wheel, "-c", code) == "fine"


WAYS = {
    "editable": """
from peft import AutoPeftModelForSequenceClassification
print(AutoPeftModelForSequenceClassification.from_pretrained({adapter!r}).peft_type.value)
""",
    "wheel": """
from transformers import pipeline
answer = pipeline("text-classification", model={adapter!r})("a text")
print("SPARTAN" if answer[0]["label"] in ("no", "yes") else answer)
""",
}


@pytest.mark.parametrize("kind", WAYS)
def test_an_adapter_is_loaded_without_importing_the_package(kind: str, adapter, request) -> None:
    assert run(request.getfixturevalue(kind), "-c", WAYS[kind].format(adapter=str(adapter))) == "SPARTAN"


@pytest.mark.parametrize("kind", WAYS)
def test_it_can_be_switched_off_is_uninstalled_and_does_not_mind_a_lost_source(kind: str, request) -> None:
    installed = request.getfixturevalue(kind)
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
