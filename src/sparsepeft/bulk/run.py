"""Answer files: each becomes one of the same name and format, with the answers beside its columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsepeft.arguments import check_whole
from sparsepeft.bulk.cluster import RayOptions, scored_by_ray
from sparsepeft.bulk.folder import held, undone
from sparsepeft.bulk.inputs import Source, find_files, look_at, read_chunks
from sparsepeft.bulk.outputs import open_output
from sparsepeft.bulk.plan import Plan, make_plan
from sparsepeft.bulk.scorer import Scored, Scorer
from sparsepeft.devices import find_device
from sparsepeft.errors import RunFailed, UserError
from sparsepeft.rows.formats import check_used
from sparsepeft.scoring.questions import TableOptions


@dataclass
class BulkReport:
    """What was done, so far or in all.

    Attributes:
        rows: answered now, those with an error among them, but not those of a file that could not be read to its end.
        failed: rows that have an error.
        truncated: rows that are longer than a task takes, and were cut as in training.
        files: written now.
        skipped: files whose answers were there.
        failed_files: why a file could not be answered, by its name.
        seconds: since the first chunk was asked for; loading is among them.
    """

    rows: int = 0
    failed: int = 0
    truncated: int = 0
    files: int = 0
    skipped: int = 0
    failed_files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows answered now in a second."""
        return self.rows / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rate = {"seconds": round(self.seconds, 3), "rows_per_second": round(self.rows_per_second, 2)}
        return {name: value for name, value in vars(self).items() if name != "seconds"} | rate


Progress = Callable[[BulkReport, float], object]


def score_files(
    inputs: str | Path | Iterable[str | Path],
    output_dir: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    model: str | None = None,
    table: TableOptions | None = None,
    dtype: str = "fp32",
    device: str | None = None,
    token_budget: int = 4096,
    threads: int | None = None,
    overwrite: bool = False,
    ray: RayOptions | None = None,
    progress: Progress | None = None,
) -> BulkReport:
    """Answer every row of files by every task.

    Each file becomes one of the same name and format (.csv, .tsv, .jsonl, .parquet, all but the last also with .gz) in
    the output folder, and is there when it is whole. What is there already is not answered again, unless its input has
    another size or date by now, so that the same call goes on after an interruption. Rows are read, answered and
    written a few thousand at a time.

    A row has its columns, then the answers: for one task ``label``, ``score``, ... as ``sparsepeft predict`` has them;
    for several ``TASK_label``, ``TASK_score``, ..., and one ``error``.

    Args:
        inputs: files, and patterns such as ``"texts/*.parquet"``.
        output_dir: new, empty, or with answers of the same tasks and settings.
        tasks: folder of each by its name, as for :class:`~sparsepeft.inference.MultiTaskEngine`. All read the same
            columns; tasks of pairs two, the others the first of these.
        model: the backbone; None is that of the first task.
        table: columns of the texts, delimiter and encoding; None as in training, or found.
        dtype: of the backbone, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        device: where to compute; None is the accelerator, if there is one, and the CPU for Ray's workers.
        token_budget: tokens of a batch, padding included.
        threads: of PyTorch; None leaves it as it is. Workers of Ray have one each by default.
        overwrite: remove the folder's former answers first.
        ray: answer in workers of a Ray cluster; None answers in this process.
        progress: called after each chunk with the report so far and the share that is done, from 0 to 1.

    Returns:
        What was done. A file that is malformed, or lacks the texts' columns, is among its ``failed_files``; the others
        are answered.

    Raises:
        UserError: something given cannot be used, or none of the files; no answer was written then.
        RunFailed: answers cannot be written, or Ray's workers fail again and again.

    Example:
        >>> report = score_files("new.csv", "out/answers", {"topic": "out/topics"}, table=TableOptions("text"))
        >>> report.rows, report.failed, sorted(path.name for path in Path("out/answers").glob("*.csv"))
        (9, 0, ['new.csv'])
    """
    folder = Path(output_dir)
    paths = find_files(inputs)
    if any(path.parent.resolve() == folder.resolve() for path in paths):
        raise UserError(f"{folder} holds the files to answer; pass another folder to `output_dir`.")
    if ray is None:
        device = str(find_device(device))
    else:
        device, threads = device or "cpu", threads or 1
        if ray.workers is not None:
            check_whole("workers", ray.workers)
    plan = make_plan(tasks, model, table, dtype=dtype, device=device, token_budget=token_budget, threads=threads)
    sources, failed = _look_at_all(paths if overwrite else undone(paths, folder), plan)
    if len(failed) == len(paths):
        raise failed[paths[0]]
    check_used({source.path: source.form for source in sources}, plan.table.delimiter, plan.table.encoding)
    names, usable = [path.name for path in paths], [source.path for source in sources]
    with held(folder, plan.settings(), names, usable, overwrite) as todo:
        sources = [source for source in sources if source.path in todo]  # others may be done by who held it meanwhile
        report = BulkReport(
            skipped=len(paths) - len(sources) - len(failed),
            failed_files={path.name: str(error) for path, error in failed.items()},
        )
        if sources:
            scored = _scored(plan, sources) if ray is None else scored_by_ray(plan, sources, ray)
            with closing(scored):
                _write(scored, sources, folder, report, progress)
        return report


def _look_at_all(paths: Iterable[Path], plan: Plan) -> tuple[list[Source], dict[Path, UserError]]:
    """The files, and why the others among them cannot be used."""
    sources: list[Source] = []
    failed: dict[Path, UserError] = {}
    for path in paths:
        try:
            sources.append(look_at(path, plan))
        except UserError as error:
            failed[path] = error
    return sources, failed


def _scored(plan: Plan, sources: Sequence[Source]) -> Generator[Scored]:
    """All chunks with their answers, in order, by this process."""
    scorer = Scorer(plan, sources)
    for number, source in enumerate(sources):
        yield from map(scorer, read_chunks(number, source, plan))


def _write(
    scored: Iterator[Scored], sources: Sequence[Source], folder: Path, report: BulkReport, progress: Progress | None
) -> None:
    """Write what comes, file by file, and keep the report."""
    sizes = [max(1, source.path.stat().st_size) for source in sources]
    done, total, start = 0, sum(sizes), time.perf_counter()
    for number, source in enumerate(sources):
        before = replace(report)
        try:
            with open_output(folder / source.path.name) as write:
                for one in _of_file(scored, number):
                    if one.failure is not None:
                        raise _Unreadable(one.failure)
                    write(one.content)
                    report.rows += one.rows
                    report.failed += one.failed
                    report.truncated += one.truncated
                    report.seconds = time.perf_counter() - start
                    if progress is not None:
                        progress(report, (done + sizes[number] * one.share) / total)
            report.files += 1
        except _Unreadable as error:
            report.rows, report.failed, report.truncated = before.rows, before.failed, before.truncated
            report.failed_files[source.path.name] = str(error)
        except OSError as error:
            raise RunFailed(
                f"{folder / source.path.name} could not be written ({error}); free space, and repeat the command to go "
                "on."
            ) from error
        done += sizes[number]


class _Unreadable(Exception):
    """A file cannot be read to its end."""


def _of_file(scored: Iterator[Scored], number: int) -> Iterator[Scored]:
    """The chunks of a file, each once and in order."""
    for place, one in enumerate(scored):
        if (one.file, one.place) != (number, place):
            raise RunFailed(f"Chunk {one.place} of file {one.file} came for chunk {place} of file {number}.")
        yield one
        if one.is_last:
            return
    raise RunFailed(f"No chunk came after the last one of file {number}, which is not whole.")
