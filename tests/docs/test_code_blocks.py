"""Every code block of the README and of docs/ runs as it is written.

Each page is followed in a folder of its own, with small models and files under the names that the pages use: a folder
``FacebookAI/roberta-base`` is what ``from_pretrained`` takes for that name, ``MODEL`` is a language model, ``DATA`` the
tasks' data, and so on.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import typer
import yaml
from tests.cli.test_cli import sparsepeft
from tests.docs.code_blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of
from tests.docs.support import with_tables
from tests.docs.workspace import build_workspace

import sparsepeft_cli.app
from sparsepeft import backbones

TUTORIAL = ROOT / "docs" / "tutorial.md"
EXAMPLES = (  # what the API reference has to show in use
    *("SpartanConfig", "BottleneckConfig", "BitFitConfig", "HeadConfig", "load_adapterhub"),
    *("SptConfig", "sparsify", "desparsify", "load_sparse", "answering", "labelled"),
    *(
        "MultiTaskEngine",
        "Predictor",
        "RunConfig",
        "train",
        "evaluate",
        "load_task",
        "export_tasks",
        "inspect_memories",
    ),
    *("memory_read", "sparse_attention", "routed_ffn", "exact_ffn", "linear_cross_entropy", "explain"),
    *("deferred_logits", "language_model_loss", "compare", "score_files"),
)


class StopEarly(hf.TrainerCallback):
    """Ends a training after two steps, with a checkpoint that can be chosen: what it learns is not the pages' point."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace as the working folder, in which trainings are short."""
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(backbones, "default_backbone", lambda: folder / "minilm")
    monkeypatch.setattr(hf.trainer, "DEFAULT_CALLBACKS", [*hf.trainer.DEFAULT_CALLBACKS, StopEarly])
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_names_a_language(page: Path) -> None:
    wrong = [
        f"{page.name}:{block.line}: {block.language!r}" for block in blocks_of(page) if block.language not in LANGUAGES
    ]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != TUTORIAL and blocks_of(page)], ids=lambda page: page.name
)
def test_the_blocks_of_a_page_run_one_after_another(page: Path, here: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.how == "not run" or block.language == "text":
            continue
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.how == "run":
                exec(code, names)
        elif block.language == "bash":
            for words in block.commands:
                _run(block, words)
        else:
            {"json": json.loads, "yaml": yaml.safe_load}[block.language](block.code)


@pytest.mark.slow
def test_the_tutorials_notebook_is_the_page_and_runs(here: Path) -> None:
    """Its cells run without Jupyter: Python as it is, ``!command`` as on the pages."""
    text = TUTORIAL.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == script("make_notebook").as_text(), "run python docs/make_notebook.py"
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(text)["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("!"):
            exec(compile(source, f"cell {number}", "exec"), names)
        elif cell["cell_type"] == "code":
            block = Block(TUTORIAL, number, "bash", source.replace("!", "", 1).replace("\n!", "\n"), "run")
            for words in block.commands:
                _run(block, words)
    assert set(names["engine"].tasks) == {"news", "money"}
    assert sorted(names["report"]["tasks"]) == ["money", "news"]


@pytest.mark.parametrize("name", ["architecture.svg", "support.md"])
def test_what_is_made_by_a_script_is_what_the_script_makes(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    if name == "support.md":
        assert written == with_tables(written), "run python -m tests.docs.support"
    else:
        assert written == script("architecture").draw(), "run python docs/architecture.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_factors_in_the_readme_are_those_of_the_result_file() -> None:
    """The share of the architecture, the totals, and what is left at equal precision and batches."""
    factors = json.loads((ROOT / "research" / "results" / "benchmarks" / "inference_tasks.json").read_text())["factors"]
    openvino = "spartan openvino-bfloat16"
    wanted = [("architecture", "spartan float32", 2), ("total", openvino, 1)]
    wanted += [
        ("over the best peer, same precision and batches", openvino, 2),
        ("length batching", "spartan float32", 1),
    ]
    readme = (ROOT / "README.md").read_text("utf-8").replace("**", "")
    for name, system, digits in wanted:
        values = [one["value"] for one in factors if one["factor"] == name and one["of"] and one["of"][0] == system]
        assert len(values) == 3
        assert ", ".join(f"{value:.{digits}f}" for value in values) in readme, name


def test_the_tests_that_a_page_names_exist() -> None:
    module = ""
    for named, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)", (ROOT / "docs" / "peft.md").read_text("utf-8")):
        module = named or module
        assert f"def {test}(" in (ROOT / "tests" / "tuners" / module).read_text("utf-8"), f"{module}::{test}"


@pytest.mark.slow
def test_examples_in_docstrings_run(here: Path) -> None:
    """As they stand, in the folder of the pages: names there are the same."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    shown = set()
    for path in sorted((ROOT / "src" / "sparsepeft").rglob("*.py")):
        if ">>>" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name):
            if example.examples:
                shown.add(example.name.rpartition(".")[2])
                runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    assert set(EXAMPLES) <= shown


def script(name: str) -> Any:
    """A module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(block: Block, words: list[str]) -> None:
    where = f"{block.page.name}:{block.line}: {' '.join(words)}"
    if words[0] == "sparsepeft":
        if block.how == "parsed only":
            _parse(words[1:])
        else:
            done = sparsepeft(*words[1:])
            assert done.returncode == 0, f"{where}\n{done.stderr}"
    elif words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{where}\n{done.stderr}"
    elif words[0] == "make":
        targets = (ROOT / "Makefile").read_text()
        assert f"\n{words[1]}:" in targets, where
    else:
        pytest.fail(f"{where}\nis no command of ours; mark its block as not run, with the reason")


def _parse(words: list[str]) -> None:
    """Read a command's options as its run would; an unknown one ends in an error."""
    command: Any = typer.main.get_command(sparsepeft_cli.app.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))
