"""Ray's workers: the same bytes as without, whatever ends meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.bulk.conftest import ROWS
from tests.tiny import write_jsonl

from sparsepeft.bulk import BulkReport, RayOptions, score_files
from sparsepeft.clusters import local_or
from sparsepeft.errors import UserError
from sparsepeft.scoring import TableOptions

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
ray = pytest.importorskip("ray.data", reason="needs the extra ray").__name__ and pytest.importorskip("ray")
OPTIONS = RayOptions(workers=2)
TEXT = TableOptions("text")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Started once, as a program may that has other work for it."""
    with local_or(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of several chunks, small ones in other formats, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("files")
    long = [{"id": number, "text": ROWS[number % 20]["text"]} for number in range(9_000)]
    pq.write_table(pa.Table.from_pylist(long), folder / "long.parquet")
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", [dict(row, file=number) for row in ROWS])
    (folder / "bad.csv").write_text("text\na\nb,c\n")
    return folder


@pytest.fixture(scope="module")
def alone(runs: dict[str, Path], files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of this process."""
    out = tmp_path_factory.mktemp("alone")
    score_files(files / "*", out, tasks(runs), table=TEXT)
    return out


def tasks(runs: dict[str, Path]) -> dict[str, Path]:
    return {name: runs[name] for name in ("mood", "names")}


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.usefixtures("cluster")
def test_two_workers_give_the_same_bytes_though_one_is_killed(
    runs: dict[str, Path], files: Path, alone: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(report: BulkReport, share: float) -> None:
        """One of the workers, when the first chunk is there."""
        if not killed:
            processes = psutil.Process().children(recursive=True)
            workers = [one for one in processes if "_Worker" in " ".join(one.cmdline())]
            assert len(workers) == 2
            killed.append(workers[0].pid)
            workers[0].kill()

    report = score_files(files / "*", tmp_path / "out", tasks(runs), table=TEXT, ray=OPTIONS, progress=kill)
    assert killed
    assert report.rows == 9_000 + 4 * len(ROWS)
    assert list(report.failed_files) == ["bad.csv"]
    assert contents(tmp_path / "out") == contents(alone)
    again = score_files(files / "*l*", tmp_path / "out", tasks(runs), table=TEXT, ray=OPTIONS)
    assert (again.files, again.skipped) == (0, 5)


@pytest.mark.usefixtures("cluster")
def test_a_task_that_cannot_be_loaded_is_told_once(runs: dict[str, Path], files: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(runs["mood"], tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="could not be loaded"):
        score_files(files / "0.jsonl", tmp_path / "out", {"broken": broken}, table=TEXT, ray=OPTIONS)
