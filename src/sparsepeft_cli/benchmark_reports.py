"""What ``sparsepeft benchmark`` shows of the reports that are worth a table."""

from __future__ import annotations

from typing import Any

from sparsepeft_cli.terminal import options


def parts_of(benchmark: str, report: dict[str, Any]) -> list[Any]:
    """Tables and sentences for a console; nothing of benchmarks whose results are for files."""
    parts = {"spt": _spt, "inference": _inference}.get(benchmark, lambda report: [])(report)
    return [options.short_dtype(part) if isinstance(part, str) else part for part in parts]


def _table(title: str, header: list[str], rows: list[list[str]]) -> Any:
    from sparsepeft_cli.terminal.console import table

    return table(title, map(options.short_dtype, header), [[options.short_dtype(row[0]), *row[1:]] for row in rows])


def _left_out(reasons: dict[str, str]) -> list[str]:
    return [f"{name} was left out: {reason}" for name, reason in reasons.items()]


def _spt(report: dict[str, Any]) -> list[Any]:
    from sparsepeft_research.tables.spt import step_table

    settings = report["settings"]
    parts: list[Any] = []
    for result in report["results"]:
        title = (
            f"{settings['model']}, {settings['layers']} layers, {settings['batch_size']} x {result['length']} tokens, "
            f"{options.short_dtype(settings['dtype'])}, {settings['device']}"
        )
        splits = [
            [name, *(f"{one['split_ms'][part]:.1f}" for part in ("attention", "ffn", "rest"))]
            for name, one in result["candidates"].items()
            if "split_ms" in one
        ]
        parts.append(_table(title, *step_table(result)))
        parts.append(_table("one step, by module", ["ms", "attention", "FFN", "rest"], splits))
        parts += _left_out(result["left_out"])
    return parts


def _inference(report: dict[str, Any]) -> list[Any]:
    """Tables of the results and factors, and sentences on what is not in them."""
    from sparsepeft_research.tables.inference import loading_note, plan_table

    settings = report["settings"]
    parts: list[Any] = [f"{settings['model']}, {settings['threads']} threads of each process"]
    parts += [_table("", *plan_table(one)) for one in report["results"]]
    for factor in report["factors"]:
        ends = " over ".join(f"{factor[end][0]} ({factor[end][1]})" for end in ("of", "over") if end in factor)
        parts.append(f"{factor['factor']} ({factor['group']}): {factor['value']:.3f}" + (f", {ends}" if ends else ""))
    if report["loading"]:
        parts.append(loading_note(report["loading"]))
    emulations = [ready.get("emulation", {}) for ready in report["processes"].values()]
    notes = dict.fromkeys(note for emulation in emulations for note in emulation.get("not_emulated", ()))
    return [*parts, *(f"not emulated: {note}" for note in notes), *_left_out(report["left_out"])]
