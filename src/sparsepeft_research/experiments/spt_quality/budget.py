"""How far a plan for a budget keeps its promise."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from sparsepeft_research.experiments.spt_quality import Run


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """One for each model."""
    yield from ()
