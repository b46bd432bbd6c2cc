"""What ``sparsepeft benchmark`` shows of the reports that are worth a table."""

from __future__ import annotations

from typing import Any

from sparsepeft_cli.terminal import options

_MIB = 2**20


def parts_of(benchmark: str, report: dict[str, Any]) -> list[Any]:
    """Tables and sentences for a console; nothing of benchmarks whose results are for files."""
    parts = {"spt": _spt, "inference": _inference}.get(benchmark, lambda report: [])(report)
    return [options.short_dtype(part) if isinstance(part, str) else part for part in parts]


def _spt(report: dict[str, Any]) -> list[Any]:
    from sparsepeft_cli.terminal.console import table

    settings = report["settings"]
    parts: list[Any] = []
    for result in report["results"]:
        title = (
            f"{settings['model']}, {settings['layers']} layers, {settings['batch_size']} x {result['length']} tokens, "
            f"{options.short_dtype(settings['dtype'])}, {settings['device']}"
        )
        steps, splits = [], []
        for name, one in result["candidates"].items():
            ratios = [one["speedup_over"].get("sdpa"), one["peak_of"].get("sdpa"), one["peak_of"].get("eager")]
            speed, *memory = ("" if value is None else f"{value:.2f}" for value in ratios)
            steps.append([name, f"{one['step']['median_ms']:.1f}", speed, f"{one['peak_bytes'] / _MIB:.1f}", *memory])
            if "split_ms" in one:
                splits.append([name, *(f"{one['split_ms'][part]:.1f}" for part in ("attention", "ffn", "rest"))])
        parts.append(table(title, ["step", "ms", "speed-up", "peak MiB", "of SDPA's", "of eager's"], steps))
        parts.append(table("one step, by module", ["ms", "attention", "FFN", "rest"], splits))
        parts += [f"{name} was left out: {reason}" for name, reason in result["left_out"].items()]
    return parts


def _inference(report: dict[str, Any]) -> list[Any]:
    """Tables of the results and factors, and sentences on what is not in them."""
    from sparsepeft_cli.terminal.console import table

    settings = report["settings"]
    parts: list[Any] = [f"{settings['model']}, {settings['threads']} threads of each process"]
    for one in report["results"]:
        rows = []
        for name, candidate in one["candidates"].items():
            over_bare = candidate["speed_over"].get(f"backbone {name.split()[-1]}")
            share, peak = candidate.get("share_of_peak"), candidate["peak_bytes"]
            rows.append(
                [
                    options.short_dtype(name),
                    f"{candidate['timing']['median_ms']:.1f}",
                    f"{candidate['inputs_per_minute']:.1f}",
                    "" if over_bare is None else f"{over_bare:.3f}",
                    "" if peak is None else f"{peak / _MIB:.0f}",
                    "" if share is None else f"{share:.0%}",
                ]
            )
        header = ["system", "ms", "per min", "vs bare", "MiB", "share"]
        parts.append(table(options.short_dtype(f"{one['group']}: {one['plan']}"), header, rows))
    parts.append(
        "per min: inputs per minute; vs bare: over the bare backbone's in this precision; MiB: peak memory of the "
        "process; share: of the machine's speed at matrix products"
    )
    for factor in report["factors"]:
        ends = " over ".join(f"{factor[end][0]} ({factor[end][1]})" for end in ("of", "over") if end in factor)
        parts.append(f"{factor['factor']} ({factor['group']}): {factor['value']:.3f}" + (f", {ends}" if ends else ""))
    if loading := report["loading"]:
        parts.append(
            f"{loading['num_loaded']} tasks in memory: {loading['resident_over_files']:.2f} times their files; another "
            f"task's turn {loading['switch_ms']:.2f} ms, swap {loading['swap_ms']:.2f} ms, with reading "
            f"{loading['replace_ms']:.1f} ms"
        )
    emulations = [ready.get("emulation", {}) for ready in report["processes"].values()]
    notes = dict.fromkeys(note for emulation in emulations for note in emulation.get("not_emulated", ()))
    parts += [f"not emulated: {note}" for note in notes]
    return parts + [f"{name} was left out: {reason}" for name, reason in report["left_out"].items()]
