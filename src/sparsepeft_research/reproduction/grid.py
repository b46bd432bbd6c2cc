"""The paper's search for hyperparameters: all points of its grid on a tenth of the training data, then the best."""

from __future__ import annotations

from typing import Any

from sparsepeft.errors import Diverged
from sparsepeft.training import RunConfig
from sparsepeft_research.reproduction.matrix import Matrix, Run
from sparsepeft_research.reproduction.protocols import SEARCHED, grid_search
from sparsepeft_research.reproduction.results import find_result, read_error


class GridSearch:
    """The search before a matrix: the points of each task and method, and what they lead to.

    Points are scored with the matrix's first seed; their results stand in ``grid/`` in the matrix's folder.

    Args:
        matrix: whose runs take the chosen values.

    Raises:
        UserError: as :meth:`Matrix.runs`, or the matrix sets a value that is searched.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        folder = matrix.output_dir / "grid"
        configs: dict[str, RunConfig] = {}
        seed = matrix.names()[2][0]
        few = matrix.num_examples if matrix.protocol == "few-shot" else None
        for task, method in matrix.pairs():
            name = f"{task}-{method}-{seed}"
            points = grid_search(
                task, method, seed, folder / "work" / name, few, matrix.max_epochs, **matrix.values_of(method)
            )
            configs |= {f"{name}-{point}": config for point, config in points.items()}
        self.points = matrix.as_runs(configs, folder)

    def chosen(self) -> dict[tuple[str, str], dict[str, Any] | None]:
        """The best point's values by task and method; None until all of its points are done or have diverged."""
        by_pair: dict[tuple[str, str], list[Run]] = {}
        for run in self.points:
            by_pair.setdefault((run.config.task, run.config.method), []).append(run)
        chosen: dict[tuple[str, str], dict[str, Any] | None] = dict.fromkeys(by_pair)
        for pair, points in by_pair.items():
            results = {run.name: find_result(run).result for run in points}
            scored = [(result["score"], run) for run in points if (result := results[run.name]) is not None]
            if scored and all(results[run.name] is not None or has_diverged(run) for run in points):
                _, best = max(scored, key=lambda score_and_run: score_and_run[0])  # the first of equals
                chosen[pair] = {name: getattr(best.config, name) for name in SEARCHED}
        return chosen

    def runs(self) -> list[Run]:
        """The matrix's runs with the chosen values, for the tasks and methods that are decided."""
        values = {
            pair: self.matrix.values_of(pair[1]) | best_values
            for pair, best_values in self.chosen().items()
            if best_values is not None
        }
        return self.matrix.runs_with(values)


def has_diverged(run: Run) -> bool:
    """Whether the last attempt at a run ended because its loss was not finite."""
    return run.error_file.exists() and read_error(run.error_file)["type"] == Diverged.__name__
