"""The results page's section on language models: what the begin-of-text token is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _markdown import table


def begin_token(folder: Path) -> str:
    """Perplexity with and without the token, from ``begin_token.py``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        what, _, way = file.stem.rpartition("-")
        found.setdefault(what, {})[way] = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for what, ways in sorted(found.items(), key=lambda item: (item[0] == "lora", item[0].zfill(9))):
        one = next(iter(ways.values()))
        name = f"LoRA, {one['steps']} steps, blocks of {one['block_length']}" if what == "lora" else f"blocks of {what}"
        for kind in one["perplexity"]:
            if what == "lora" and kind == "dense":
                continue  # before training: the dense row of the same length
            values = [ways[way]["perplexity"][kind] if way in ways else None for way in ("without", "with")]
            shown = ["" if value is None else f"{value:,.1f}" for value in values]
            rows.append([f"{name}, {kind}", *shown])
    if not rows:
        return ""
    first = next(iter(next(iter(found.values())).values()))
    return "\n\n".join(
        [
            "## The begin-of-text token",
            f"{first['model']}, whose tokenizer puts `{_token(found)}` before every text: perplexity on about "
            f"{round(_scored(found), -3):,} tokens of WikiText-2's test part, cut into blocks that begin with the "
            "token or do not; sparse by `SptConfig`'s defaults (L = n/8 by token, half of 8 blocks), before any "
            "fine-tuning. By `python experiments/begin_token.py --data-dir DATA --model GEMMA`.",
            table(["", "without", "with"], rows),
        ]
    )


def _token(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    return next(str(result["bos_token"]) for ways in found.values() for result in ways.values() if result["bos_token"])


def _scored(found: dict[str, dict[str, dict[str, Any]]]) -> int:
    return max(result.get("num_scored_tokens", 0) for ways in found.values() for result in ways.values())
