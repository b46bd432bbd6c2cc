"""What sparsity (SPT) costs in quality, before and after fine-tuning with LoRA.

    python -m sparsepeft_research.experiments.spt_quality conversion finetuning --data-dir DATA --model GEMMA
    python -m sparsepeft_research.experiments.spt_quality lm starts encoder --data-dir DATA --model LLAMA

Kinds of runs, each in a module of its own. The first three are about a language model of any size:

- ``conversion``: nothing is trained. Perplexity of the model with sparse attention, by each way to choose keys.
- ``finetuning``: LoRA on the sparse model against LoRA on the dense one.
- ``budget``: how far a plan for a budget keeps its promise on held-out text, in perplexity and time.
- ``lm``, ``starts``, ``encoder``: SPT in the paper's form on small models, see :mod:`.small`.

Results go to ``research/results/spt_quality/``, one file a run. What is there is not repeated, and processes may share
the work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """One run.

    Attributes:
        name: of its result file, without the suffix; folders in it are made.
        about: what it is: ``kind``, ``setting`` and more, as the result file says it.
        measure: does it; it may keep files in the folder that it is handed, which later runs find there.
    """

    name: str
    about: dict[str, Any]
    measure: Callable[[Path], dict[str, Any]]
