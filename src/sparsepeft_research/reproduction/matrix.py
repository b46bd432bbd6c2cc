"""A matrix of runs: tasks x methods x seeds under one protocol, and one folder for its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError, unknown_name
from sparsepeft.methods.models import adapter_config
from sparsepeft.methods.recipes import METHODS
from sparsepeft.runs.held_out import load_task_data
from sparsepeft.tasks import task_spec
from sparsepeft.training import RunConfig
from sparsepeft.training.data import MAX_SELECTION
from sparsepeft.training.fit import FEW_SHOT_STEPS, NUM_EVALUATIONS
from sparsepeft_research.reproduction.protocols import FEW_SHOT_EXAMPLES, few_shot, full_data

SEEDS = (42, 43, 44)
PROTOCOLS = ("full-data", "few-shot")
_SAMPLED_TEXTS = 200
_DECIDED = ("task", "method", "seed", "output_dir", "few_shot")


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task's data before training on it.

    Attributes:
        num_train: training examples there are.
        mean_chars: mean characters of an example, from the first few.
        fingerprints: of the files read.
        num_reported: examples that a trained model is scored on.
    """

    num_train: int
    mean_chars: float
    fingerprints: dict[str, str]
    num_reported: int = 0


@dataclass(frozen=True)
class Run:
    """One run and the files it owns.

    Attributes:
        name: of its files: ``"cola-spartan-42"``.
        folder: where the results of its matrix stand.
        config: what it does.
        model: the backbone's name in result files.
        facts: about its task's data.
    """

    name: str
    folder: Path
    config: RunConfig
    model: str
    facts: TaskFacts

    @property
    def result_file(self) -> Path:
        """What ``train`` returned, once the run is finished."""
        return self.folder / f"{self.name}.json"

    @property
    def error_file(self) -> Path:
        """How the last attempt failed."""
        return self.folder / f"{self.name}.error.json"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that does this run."""
        return self.work_folder.with_name(f"{self.work_folder.name}.lock")

    @property
    def work_folder(self) -> Path:
        """Checkpoints and weights."""
        return Path(self.config.output_dir)

    @property
    def steps(self) -> int:
        """Training steps this run will take, up to rounding."""
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        if config.few_shot is not None:
            return FEW_SHOT_STEPS
        examples = min(self.facts.num_train, config.max_train_samples or self.facts.num_train)
        return max(1, round(0.9 * examples / config.recipe_values().batch_size * (config.epochs or 1)))

    @property
    def num_scored(self) -> int:
        """Examples this run predicts: at the end, and with a tenth of the training data to choose a checkpoint on."""
        config = self.config
        used = min(self.facts.num_train, config.max_train_samples or self.facts.num_train)
        if config.score_on == "selection":
            selection = reported = min(used // 10, MAX_SELECTION)
        else:
            selection, reported = used // 10, self.facts.num_reported
        return reported + (0 if config.few_shot is not None else NUM_EVALUATIONS * selection)

    @property
    def work(self) -> float:
        """Characters this run reads in training: what its time grows with."""
        return self.steps * self.config.recipe_values().batch_size * self.facts.mean_chars


@dataclass(frozen=True)
class Matrix:
    """Runs of one protocol.

    Args:
        tasks, methods, seeds: one run for each combination.
        output_dir: folder of the results.
        protocol: ``"full-data"`` or ``"few-shot"``.
        num_examples: K of the few-shot protocol.
        max_epochs: cap on the epochs of the full-data protocol.
        values: further fields of every :class:`RunConfig`, such as ``model``, ``data_dir`` or ``precision``.
        method_values: the same for the runs of one method, by its name; they go before ``values``.
    """

    tasks: Sequence[str]
    methods: Sequence[str]
    output_dir: Path
    protocol: str = "full-data"
    seeds: Sequence[int] = SEEDS
    num_examples: int = FEW_SHOT_EXAMPLES
    max_epochs: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    method_values: dict[str, dict[str, Any]] = field(default_factory=dict)
    _known: dict[str, TaskFacts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def runs(self) -> list[Run]:
        """Every run, in the order in which they are done: seed by seed, so that a part of the matrix is of use; within
        a seed the short ones first.

        Raises:
            UserError: a task, method, seed, value, model or the data of a task cannot be used.
        """
        return self.runs_with({(task, method): self.values_of(method) for task, method in self.pairs()})

    def runs_with(self, values: Mapping[tuple[str, str], dict[str, Any]]) -> list[Run]:
        """The same for the tasks and methods in ``values`` alone, each with its own values."""
        _, _, seeds = self.names()
        configs = [
            self.config(task, method, seed, pair_values)
            for (task, method), pair_values in values.items()
            for seed in seeds
        ]
        return self.as_runs({Path(config.output_dir).name: config for config in configs}, self.output_dir)

    def values_of(self, method: str) -> dict[str, Any]:
        """The values of a method's runs: those of every run, and its own."""
        own = self.method_values.get(method, {})
        settings = {**(self.values.get("settings") or {}), **(own.get("settings") or {})}
        return {**self.values, **own, "settings": settings}

    def pairs(self) -> list[tuple[str, str]]:
        """Every task with every method."""
        tasks, methods, _ = self.names()
        return [(task, method) for task in tasks for method in methods]

    def as_runs(self, configs: Mapping[str, RunConfig], folder: Path) -> list[Run]:
        """Runs in order, from their configs by name."""
        _, _, seeds = self.names()
        for config in configs.values():
            adapter_config(config.method, config.recipe_values().adapter)
        model = describe_backbone(resolve_model(self.values.get("model")))
        runs = [Run(name, folder, config, model, self._facts(config)) for name, config in configs.items()]
        return sorted(runs, key=lambda run: (seeds.index(run.config.seed), run.work))

    def names(self) -> tuple[list[str], list[str], list[int]]:
        """Tasks, methods and seeds, each once.

        Raises:
            UserError: one is unknown, there are none, or something else about the matrix cannot be used.
        """
        if self.protocol not in PROTOCOLS:
            raise UserError(unknown_name("protocol", self.protocol, PROTOCOLS))
        if self.max_epochs is not None and self.protocol == "few-shot":
            raise UserError(
                "`max_epochs` was given with the few-shot protocol, which counts steps; pass `max_steps` instead."
            )
        fields = {f.name for f in dataclasses.fields(RunConfig)}
        if absent := sorted(self.method_values.keys() - set(self.methods)):
            raise UserError(
                f"Values were given for {', '.join(absent)}, but the methods are {', '.join(self.methods)}; leave them "
                "out, or add the method."
            )
        for name in dict.fromkeys([*self.values, *(key for own in self.method_values.values() for key in own)]):
            if name not in fields:
                raise UserError(unknown_name("value of a run", name, fields))
            if name in _DECIDED:
                raise UserError(f"`{name}` was given for all runs, but the matrix decides it; leave it out.")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(unknown_name("method", method, METHODS))
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise UserError(f"No `{name}` were given, but a matrix needs at least one.")
        tasks = [task_spec(task).name for task in self.tasks]
        return list(dict.fromkeys(tasks)), list(dict.fromkeys(self.methods)), list(dict.fromkeys(self.seeds))

    def config(self, task: str, method: str, seed: int, values: dict[str, Any]) -> RunConfig:
        """The config of one run under this matrix's protocol."""
        folder = self.output_dir / "work" / f"{task}-{method}-{seed}"
        values = {**values, "settings": dict(values.get("settings") or {})}
        if self.protocol == "full-data":
            return full_data(task, method, seed, folder, self.max_epochs, **values)
        return few_shot(task, method, seed, folder, self.num_examples, **values)

    def _facts(self, config: RunConfig) -> TaskFacts:
        """About a task's data, which is loaded once: that is how its files are checked before the first run."""
        if config.task not in self._known:
            self._known[config.task] = _facts(config)
        return self._known[config.task]


def _facts(config: RunConfig) -> TaskFacts:
    data = load_task_data(config)
    first = data.train[:_SAMPLED_TEXTS]
    texts = [text for column in data.spec.text_columns for text in first[column]]
    num_texts = min(_SAMPLED_TEXTS, len(data.train))
    return TaskFacts(
        len(data.train),
        sum(map(len, texts)) / num_texts,
        dict(data.fingerprints),
        sum(map(len, data.scored_parts.values())),
    )
