"""The tables of docs/support.md that follow from what the tests run: ``python -m tests.docs.support`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.models import ARCHITECTURES, METHODS, REFUSED
from tests.spt.models import DECODERS, ENCODERS, EXPERTS, FEED_FORWARD_ONLY

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
_REGION = re.compile(r"(<!-- generated: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, [" --- "] * len(header), *rows]
    return "".join("|" + "|".join(f" {cell.strip()} " for cell in line) + "|\n" for line in lines)


def _architectures() -> str:
    """Every architecture that the tests adapt, by method."""

    def row(name: str) -> list[str]:
        model = type(ARCHITECTURES[name].build()).__name__
        cells = ["refused" if name in REFUSED.get(method, ()) else "tested" for method in METHODS]
        return [f"`{model}`", *cells]

    return _table(["model", *METHODS], map(row, ARCHITECTURES))


def _sparse() -> str:
    """Every architecture that the tests make sparse."""
    kinds = [
        (DECODERS | ENCODERS, "tested", "tested"),
        (FEED_FORWARD_ONLY, "refused", "tested"),
        (EXPERTS, "expected", "refused in layers with experts"),
    ]
    rows: dict[str, list[str]] = {}
    for models, attention, ffn in kinds:
        for cls, _ in models.values():
            attention = "refused" if "Switch" in cls.__name__ else attention  # as T5's
            rows.setdefault(cls.__name__, [f"`{cls.__name__}`", attention, ffn])
    return _table(["model", "sparse attention", "sparse FFN"], rows.values())


TABLES = {"architectures": _architectures, "sparse": _sparse}


def with_tables(page: str) -> str:
    """The page with its generated tables as they are now."""
    return _REGION.sub(lambda region: region[1] + TABLES[region["name"]]() + region[3], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
