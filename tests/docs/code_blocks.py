"""Code blocks of Markdown pages, and how each language of them is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"python", "bash", "yaml", "json", "text"}  # `text` is what no one would run: output, layouts of folders
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\s*$")
_COMMENT = re.compile(r"<!-- (?P<how>parsed only|not run): (?P<reason>.+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the file it is in.
        line: of its first line of code, counted from 1.
        language: what the fence names.
        code: its text.
        how: "run"; or, by a comment above the block, "parsed only" (commands that would take minutes) or "not run".
    """

    page: Path
    line: int
    language: str
    code: str
    how: str

    @property
    def commands(self) -> Iterator[list[str]]:
        """The commands of a block for a shell, as lists of words, without comments."""
        for line in self.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks, in order."""
    blocks, lines = [], page.read_text(encoding="utf-8").splitlines()
    start, language, indent, how = 0, "", "", "run"
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if start:
            code = "\n".join(text.removeprefix(indent) for text in lines[start : number - 1])
            blocks.append(Block(page, start + 1, language, code, how))
            start = 0
        else:
            start, language, indent = number, fence["language"], fence["indent"]
            above = next((text for text in reversed(lines[: number - 1]) if text.strip()), "")
            comment = _COMMENT.fullmatch(above.strip())
            how = comment["how"] if comment else "run"
    return blocks
