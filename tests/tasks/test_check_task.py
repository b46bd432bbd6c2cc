"""What is wrong with names, files, columns and rows is found before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsepeft.tasks import TaskError, check_task


def test_good_input_passes(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text;label\n" + "a;1\nb;2\n" * 3)
    check_task(None)
    check_task("lm")
    check_task("topics")
    check_task("rte")  # from the hub
    check_task(None, train_file=path)
    check_task("custom", train_file=str(path), validation_file=path, delimiter=";")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst3"}, r"unknown task 'sst3': did you mean 'sst2'\? .*custom .* and lm"),
        ({"task": "custom"}, r"pass `train_file`"),
        ({"task": "rte", "train_file": "x.csv"}, r"`train_file` came with the task 'rte'"),
        ({"task": "rte", "data_dir": "none"}, r"the data folder none does not exist"),
        ({"train_file": "none.csv"}, r"none\.csv does not exist"),
        ({"train_file": "{good}", "validation_file": "none.csv"}, r"none\.csv does not exist"),
        ({"train_file": "{good}", "text_column": "body"}, r"`text_column=body` was given, but the columns are"),
        ({"train_file": "{good}", "test_file": "{other}"}, r"other\.csv: no column 'label'"),
        ({"train_file": "{good}", "problem_type": "ranks"}, r"`problem_type=ranks` was given"),
        ({"train_file": "{good}", "problem_type": "regression"}, r"good\.csv:2: the label is 'yes'"),
        ({"train_file": "{few}"}, r"few\.csv has 2 row\(s\); expected at least 3"),
        ({"train_file": "{empty}"}, r"empty\.csv has no rows"),
    ],
)
def test_what_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("SPARSEPEFT_DATA", raising=False)
    files = {
        "good": "text,label\nx,yes\ny,no\nz,no\n",
        "other": "text,mood,n\nx,yes,1\n",
        "few": "text,label\nx,a\ny,b\n",
        "empty": "text,label\n",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.csv").write_text(content)
    places = {name: str(tmp_path / f"{name}.csv") for name in files}
    with pytest.raises(TaskError, match=message):
        check_task(**{"task": None, **{key: value.format(**places) for key, value in options.items()}})


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text;label\n" + "a;1\nb;2\n" * 3)
    code = (
        "import sys; from sparsepeft.tasks import bbc, check_task, glue, hub; "
        "check_task(None, train_file=sys.argv[1]); check_task('topics'); "
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'sklearn', 'scipy', 'numpy', 'pyarrow'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
