"""From timings to figures: throughput, ratios, each factor by itself, and a picture of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepeft.plotting import COLOURS, require_matplotlib, write_drawing
from sparsepeft_research.benchmarks.inference.workloads import BY_TOKENS, PADDED
from sparsepeft_research.benchmarks.measuring import Timing
from sparsepeft_research.benchmarks.settings import BACKBONE, ENGINE, ENGINE_UPPER, ONNX, OPENVINO, PEERS, UNFUSED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR_INCHES, _PANEL_INCHES = 0.22, 0.7
_BASE, _FAST = "float32", "bfloat16"
_USUAL_PEER = "adapters-pfeiffer"


@dataclass
class Measured:
    """What one plan gave in one group.

    Attributes:
        group: whose candidates were timed against each other.
        plan: what they ran: its name.
        num_inputs: texts of the plan.
        timings: of the whole plan, by candidate (``"spartan bfloat16"``).
        products: timings of bare matrix products in the same run.
        product_flops: their floating point operations.
        flops: of the backbone's matrix products in the plan, where they are compared with ``products``.
        peak_bytes: of each candidate's process, with all plans that it ran.
    """

    group: str
    plan: str
    num_inputs: int
    timings: dict[str, Timing]
    products: dict[str, Timing] = field(default_factory=dict)
    product_flops: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def inputs_per_minute(self, candidate: str) -> float:
        """Throughput by the median."""
        return 60_000 * self.num_inputs / self.timings[candidate].median_ms

    def peak_flops_per_s(self) -> float | None:
        """The machine's speed at its best measured matrix product."""
        rates = [1e3 * self.product_flops[name] / timing.median_ms for name, timing in self.products.items()]
        return max(rates, default=None)


def describe(measured: Sequence[Measured]) -> dict[str, Any]:
    """``results``, a plan of a group each, and the ``factors`` between them."""
    return {"results": [_result(one) for one in measured], "factors": factors(measured)}


def _result(one: Measured) -> dict[str, Any]:
    peak = one.peak_flops_per_s()
    candidates = {}
    for name, timing in one.timings.items():
        baselines = [other for other in one.timings if other != name and other.split()[0] in (BACKBONE, *PEERS)]
        figures: dict[str, Any] = {
            "timing": timing._asdict(),
            "inputs_per_minute": one.inputs_per_minute(name),
            "speed_over": {other: _ratio(one, name, one, other) for other in baselines},
            "peak_bytes": one.peak_bytes.get(name),
        }
        if peak is not None and one.flops is not None:
            figures["share_of_peak"] = 1e3 * one.flops / timing.median_ms / peak
        candidates[name] = figures
    return {
        "group": one.group,
        "plan": one.plan,
        "num_inputs": one.num_inputs,
        "candidates": candidates,
        "flops": one.flops,
        "peak_flops_per_s": peak,
        "products": {name: timing._asdict() for name, timing in one.products.items()},
    }


def factors(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Ratios of throughputs that differ in one thing each.

    On a task's real lengths, each factor is measured alone, starting from SPARTAN in float32 with padded batches. For
    an engine in bfloat16, ONNX Runtime in int8 and OpenVINO in bfloat16 their ``"product for ..."`` stands beside the
    ``"total"`` that is measured of all of them together.

    Returns:
        Each with ``factor``, ``group``, ``of`` and ``over`` (candidate, plan) and ``value``: how many times as many
        inputs per minute ``of`` has.
    """
    every: list[dict[str, Any]] = []
    for group in dict.fromkeys(one.group for one in measured):
        plans = {one.plan: one for one in measured if one.group == group}
        padded, by_tokens = plans.get(f"{group}, {PADDED}"), plans.get(f"{group}, {BY_TOKENS}")
        if padded is not None and by_tokens is not None:
            every += _of_task(group, padded, by_tokens)
        else:
            every += _of_shapes(group, plans)
    return every


def _of_task(group: str, padded: Measured, by_tokens: Measured) -> list[dict[str, Any]]:
    """One configuration in PyTorch, in ONNX Runtime and in OpenVINO, each with what it is made of."""
    spartan, peer, engine = f"spartan {_BASE}", f"{_USUAL_PEER} {_BASE}", f"{ENGINE} {_BASE}"
    runtimes = (
        (f"spartan {ONNX}{_BASE}", f"spartan {ONNX}int8"),
        (f"spartan {OPENVINO}{_BASE}", f"spartan {OPENVINO}{_FAST}"),
    )
    shared = [
        _factor("architecture", group, padded, spartan, padded, peer),
        _factor("length batching", group, by_tokens, spartan, padded, spartan),
    ]
    parts_of = {
        f"{ENGINE} {_FAST}": [
            _factor("precision", group, padded, f"spartan {_FAST}", padded, spartan),
            _factor("engine", group, by_tokens, engine, by_tokens, spartan),
        ]
    } | {
        fast: [
            _factor("runtime", group, padded, exported, padded, spartan),
            _factor("precision", group, padded, fast, padded, exported),
        ]
        for exported, fast in runtimes
    }
    made = [*shared]
    for best, parts in parts_of.items():
        made += parts
        values = [one["value"] for one in (*shared, *parts) if one]
        if len(values) == len(shared) + len(parts):
            made.append({"factor": f"product for {best}", "group": group, "value": math.prod(values)})
        made.append(_factor("total", group, by_tokens, best, padded, peer))
        precision = best.split()[1].removeprefix(OPENVINO)
        rivals = [name for name in by_tokens.timings if name.split()[0] in PEERS and name.split()[1] == precision]
        rival = min(rivals, key=lambda name: by_tokens.timings[name].median_ms, default="")
        made.append(_factor("over the best peer, same precision and batches", group, by_tokens, best, by_tokens, rival))
    return [one for one in made if one]


def _of_shapes(group: str, plans: dict[str, Measured]) -> list[dict[str, Any]]:
    made = []
    for plan in plans.values():
        for name in plan.timings:
            system, precision = name.split()
            if system == "spartan":
                made += [_factor("architecture", group, plan, name, plan, f"{BACKBONE} {precision}")]
                made += [_factor("architecture", group, plan, name, plan, f"{peer} {precision}") for peer in PEERS]
                made += [_factor("fusion", group, plan, name, plan, f"{UNFUSED} {precision}")]
            if precision != _BASE:
                made += [_factor("precision", group, plan, name, plan, f"{system} {_BASE}")]
            single = plans.get(plan.plan.removesuffix(", mixed"))
            if single is not None and single is not plan:
                made += [_factor("mixed batches", group, plan, name, single, name)]
            separate = plans.get(plan.plan.removesuffix(", all") + ", separate")
            if system == ENGINE_UPPER and separate is not None and separate is not plan:
                made += [_factor("shared lower layers", group, plan, name, separate, name)]
    return [one for one in made if one]


def _factor(factor: str, group: str, of: Measured, candidate: str, over: Measured, other: str) -> dict[str, Any] | None:
    if candidate not in of.timings or other not in over.timings:
        return None
    return {
        "factor": factor,
        "group": group,
        "of": [candidate, of.plan],
        "over": [other, over.plan],
        "value": _ratio(of, candidate, over, other),
    }


def _ratio(of: Measured, candidate: str, over: Measured, other: str) -> float:
    return of.inputs_per_minute(candidate) / over.inputs_per_minute(other)


def device_throughput(content: Any) -> tuple[str, dict[str, Any], dict[str, float]]:
    """The throughput columns of the paper's Table 1 from a result file's content: batch 32 in float32.

    Returns:
        The emulated device, the backbone's architecture, and inputs per minute by method (``"full"`` is the backbone).

    Raises:
        ValueError: it is no result of an emulated device with batches of 32 in float32.
    """
    try:
        settings = content["settings"]
        device, architecture = settings["device"], settings["architecture"]
        results: Iterable[dict[str, Any]] = content["results"]
        wanted = [one for one in results if one["group"] == _BASE and one["num_inputs"] == 32]
        rates = {name.split()[0]: one["inputs_per_minute"] for name, one in wanted[0]["candidates"].items()}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError("it has no batches of 32 in float32") from error
    if device is None:
        raise ValueError("it was measured on no emulated device")
    return device, architecture, {"full" if name == BACKBONE else name: rate for name, rate in rates.items()}


def throughput_figure(report: dict[str, Any]) -> Figure:
    """Bars of inputs per minute, with the quartiles of the passes; a colour for each precision.

    Args:
        report: the content of a result file.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    results = report["results"]
    heights = [_BAR_INCHES * len(one["candidates"]) + _PANEL_INCHES for one in results]
    figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = dict(zip(report["settings"]["precisions"], COLOURS, strict=False))
    for axes, one in zip(panels, results, strict=True):
        for place, (name, figures) in enumerate(one["candidates"].items()):
            rate, timing = figures["inputs_per_minute"], figures["timing"]
            slow, fast = (rate * timing["median_ms"] / timing[f"{which}_quartile_ms"] for which in ("third", "first"))
            axes.barh(place, rate, xerr=[[rate - slow], [fast - rate]], color=colours[name.split()[-1]], capsize=2)
        axes.set_yticks(range(len(one["candidates"])), list(one["candidates"]))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_title(f"{one['group']}: {one['plan']}", loc="left", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel(f"inputs per minute, {report['settings']['model']}, {report['settings']['threads']} threads")
    return figure


def write_figure(report: dict[str, Any], path: Path) -> list[Path]:
    """Write the figure as PNG and SVG; ``path`` is without suffix.

    Raises:
        UserError: matplotlib is not installed.
    """
    return write_drawing(lambda: throughput_figure(report), path)
