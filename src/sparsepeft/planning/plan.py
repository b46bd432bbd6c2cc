"""Which settings each module of a model gets, so that the model is fast and keeps to a budget of quality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_BINS = 4096  # that the budget is cut into
DENSE = {"dense": True}


@dataclass(frozen=True)
class Choice:
    """What a module may become.

    Attributes:
        settings: what :class:`SptConfig` calls ``overrides`` of it.
        loss_change: by how much the model's mean loss of a token rises, in nats, if it alone is changed.
        dense_ms, sparse_ms: forward and backward, of the dense module and of what it becomes.
    """

    settings: dict[str, Any]
    loss_change: float
    dense_ms: float
    sparse_ms: float

    def cost(self, surcharge: float) -> float:
        """Nats that it is taken to cost, where single measurements are known to say too little by a surcharge.

        A loss that falls counts as one that stays, since it may well be chance; one that cannot change costs nothing.
        """
        return max(self.loss_change, 0.0) + surcharge if self.loss_change else 0.0


@dataclass(frozen=True)
class Plan:
    """What ``SptConfig.budget`` made of a model: kept as ``model.sparsification.plan``; ``print`` shows a table.

    Attributes:
        budget: how much higher the perplexity may become, as a share.
        modules: what each has become, by name.
        perplexity: ``{"dense": ..., "sparse": ...}`` on the ``"calibration"`` batch and on the ``"held_out"`` one, if
            there was one.
        step_ms: forward and backward through the model's layers, its head apart, ``"dense"`` and ``"sparse"``: medians
            of alternating runs on the part of the calibration batch that ``step_shape`` (sequences, tokens) says.
        step_shape: see there.
        num_tried: plans that were measured until one kept to the budget.
    """

    budget: float
    modules: dict[str, Choice]
    perplexity: dict[str, dict[str, float]]
    step_ms: dict[str, float]
    step_shape: tuple[int, int]
    num_tried: int

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """The settings of each module, for :class:`SptConfig`."""
        return {name: choice.settings for name, choice in self.modules.items()}

    @property
    def predicted_change(self) -> float:
        """By how much the perplexity should have risen, as a share: all modules' losses added up."""
        return math.expm1(sum(choice.loss_change for choice in self.modules.values()))

    @property
    def measured_change(self) -> dict[str, float]:
        """By how much it has, on each text."""
        return {name: each["sparse"] / each["dense"] - 1 for name, each in self.perplexity.items()}

    @property
    def predicted_time(self) -> float:
        """A step's time over the dense one's: from the times of the single modules."""
        saved = sum(choice.dense_ms - choice.sparse_ms for choice in self.modules.values())
        return 1 - saved / self.step_ms["dense"]

    @property
    def measured_time(self) -> float:
        """The same, of whole steps."""
        return self.step_ms["sparse"] / self.step_ms["dense"]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, with the figures that follow from the rest."""
        names = ("predicted_change", "measured_change", "predicted_time", "measured_time")
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in names}
        return values | {"step_shape": list(self.step_shape)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """What :meth:`to_dict` gave."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        modules = {name: Choice(**choice) for name, choice in known["modules"].items()}
        return cls(**known | {"modules": modules, "step_shape": tuple(known["step_shape"])})

    def __str__(self) -> str:
        """A table of the modules, and totals."""
        rows = [("module", "becomes", "perplexity", "time of dense")]
        for name, choice in self.modules.items():
            is_dense = choice.settings == DENSE
            change = "" if is_dense else f"{math.expm1(choice.loss_change):+.2%}"
            rows.append((name, _words(choice.settings), change, "" if is_dense else _time(choice)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:<{widths[0]}}  {becomes:<{widths[1]}}  {change:>{widths[2]}}  {time:>{widths[3]}}"
            for name, becomes, change, time in rows
        ]
        lines.append(f"perplexity predicted: {self.predicted_change:+.2%}, of {self.budget:.2%} allowed")
        for name, risen in self.measured_change.items():
            each = self.perplexity[name]
            lines.append(
                f"perplexity, {name.replace('_', ' ')} text: {each['dense']:.2f} dense, {each['sparse']:.2f} sparse "
                f"({risen:+.2%})"
            )
        sequences, tokens = self.step_shape
        lines.append(
            f"a step through the layers, head apart, {sequences} x {tokens} tokens: {self.measured_time:.2f} of the "
            f"dense time ({self.step_ms['sparse']:.0f} of {self.step_ms['dense']:.0f} ms; predicted "
            f"{self.predicted_time:.2f})"
        )
        return "\n".join(line.rstrip() for line in lines)


def fastest(options: Mapping[str, Sequence[Choice]], allowance: float, surcharge: float = 0.0) -> dict[str, Choice]:
    """One choice for each module, such that the time is least and the costs add up to ``allowance`` at most.

    The multiple-choice knapsack problem, by dynamic programming.

    Args:
        options: of each module, one of which costs nothing.
        allowance: nats.
        surcharge: of :meth:`Choice.cost`.
    """
    unit = allowance / _BINS
    best = torch.zeros(_BINS + 1, dtype=torch.float64)  # least time by what may be spent
    picks: list[torch.Tensor] = []
    costs = {
        name: [
            0 if nats == 0 else math.ceil(nats / unit) if nats <= allowance else _BINS + 1  # NaN is out, too
            for nats in (choice.cost(surcharge) for choice in choices)
        ]
        for name, choices in options.items()
    }
    for name, choices in options.items():
        times = torch.full((len(choices), _BINS + 1), math.inf, dtype=torch.float64)
        for row, choice, cost in zip(times, choices, costs[name], strict=True):
            if cost <= _BINS:
                row[cost:] = best[: _BINS + 1 - cost] + choice.sparse_ms
        best, pick = times.min(0)
        picks.append(pick)
    left = _BINS
    chosen: dict[str, Choice] = {}
    for name, pick in zip(reversed(list(options)), reversed(picks), strict=True):
        index = int(pick[left])
        chosen[name] = options[name][index]
        left -= costs[name][index]
    return {name: chosen[name] for name in options}


def _time(choice: Choice) -> str:
    return f"{choice.sparse_ms:.1f} of {choice.dense_ms:.1f} ms"


def _words(settings: Mapping[str, Any]) -> str:
    """Settings for people."""
    if settings == DENSE:
        return "dense"
    if "top_l" in settings:
        return f"{settings['top_l']} keys by {settings['granularity']}"
    rank = f", linear map of rank {settings['compensation_rank']}" if settings.get("compensation_rank") else ""
    return f"{settings['values']}, {settings['num_active_blocks']} of {settings['num_blocks']} blocks{rank}"
