"""Write docs/tutorial.ipynb from docs/tutorial.md: ``python docs/make_notebook.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).with_name("tutorial.md")
_BLOCK = re.compile(r"(<!-- not run: [^\n]* -->\n)?```(python|bash)\n(.*?)```\n", re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """The page as a notebook: a code cell for each block that runs, a Markdown cell for what stands between them."""
    cells: list[dict[str, Any]] = []
    text = ""
    end = 0
    for block in _BLOCK.finditer(page):
        marked, language, code = block.groups()
        text += page[end : block.start()]
        end = block.end()
        if marked:
            text += f"```{language}\n{code}```\n"
            continue
        if language == "bash":
            code = "".join(f"!{line}\n" for line in code.splitlines())
        cells += [_cell("markdown", text), _cell("code", code)]
        text = ""
    cells.append(_cell("markdown", text + page[end:]))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "source": text.strip().splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def as_text() -> str:
    """The notebook's file, for the page as it is."""
    return json.dumps(notebook(_PAGE.read_text(encoding="utf-8")), ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    _PAGE.with_suffix(".ipynb").write_text(as_text(), encoding="utf-8")
