"""Every code block of the README and of docs/ runs as it is written.

Each page is followed in a folder of its own, with small models and files under the names that the pages use: a folder
``FacebookAI/roberta-base`` is what ``from_pretrained`` takes for that name, ``MODEL`` is a language model, ``DATA`` the
tasks' data, and so on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tests.cli.test_cli import sparsepeft
from tests.docs.code_blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of
from tests.docs.workspace import build_workspace

import sparsepeft_cli.app
from sparsepeft import backbones


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_names_a_language(page: Path) -> None:
    wrong = [
        f"{page.name}:{block.line}: {block.language!r}" for block in blocks_of(page) if block.language not in LANGUAGES
    ]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_one_after_another(
    page: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    shutil.copytree(workspace, here, symlinks=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(backbones, "default_backbone", lambda: here / "minilm")
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
