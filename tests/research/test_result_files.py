"""Result files: one schema and one reader; generated pages are what the generator makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsepeft.errors import UserError
from sparsepeft_research.results import RESULTS, ROOT, Result, read_result, write_result
from sparsepeft_research.tables.__main__ import PAGES, PICTURES, TABLES, fill, page

MACHINE = {"commit": "abc", "date": "2026-01-01", "versions": {"torch": "2"}, "cpu": "a processor", "threads": 2}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    result = Result("memory", {"repeats": 3}, [{"median_ms": 1.0}], MACHINE, 7, {"notes": ["one"]})
    write_result(tmp_path / "memory.json", result)
    assert read_result(tmp_path / "memory.json") == result
    assert result.machine == "a processor, 2 threads"


def test_every_stored_file_says_when_by_what_and_where_it_was_made() -> None:
    # Runs that were interrupted keep their checkpoints in folders named work, which git leaves out.
    files = sorted(file for file in RESULTS.rglob("*.json") if "work" not in file.relative_to(RESULTS).parts)
    assert len(files) > 300
    for file in files:
        result = read_result(file)
        assert result.results, file
        assert len(result.environment["commit"]) >= 40, file


def test_files_from_before_the_schema(tmp_path: Path) -> None:
    content = {"model": "a model", "groups": {"methods": {}}, "environment": MACHINE | {"seed": 3}}
    (tmp_path / "finetuning.json").write_text(json.dumps(content))
    result = read_result(tmp_path / "finetuning.json")
    assert (result.measured, result.seed, result.settings["model"]) == ("finetuning", 3, "a model")
    assert result.results == {"methods": {}}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not a result file"), ("[]", "not a result file"), ('{"environment": {"commit": "a"}}', "lacks date")],
)
def test_other_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_result(tmp_path / "x.json")


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    written = (ROOT / "docs" / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert written == page(name), "run python -m sparsepeft_research.tables"


def test_tables_within_pages_and_pictures_are_current() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        assert text == fill(text), f"{file}: run python -m sparsepeft_research.tables"
    for name, source in PICTURES.items():
        assert (ROOT / "docs" / "results" / name).read_bytes() == (RESULTS / source).read_bytes()
    shown = {table for _, tables in PAGES.values() for table in tables}
    assert {name for name, table in TABLES.items() if table.title} == shown


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'few-shot'"):
        fill("<!-- table: few-shots -->\n<!-- end -->")
