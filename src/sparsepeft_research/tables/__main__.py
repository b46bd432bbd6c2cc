"""Write the generated parts of the documentation from ``research/results``: pages, and tables between markers.

    python -m sparsepeft_research.tables

``docs/results/*.md`` are written whole. In the other pages and the README a table stands between two markers,
``<!-- table: NAME -->`` and ``<!-- end -->``; what is between them is replaced.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sparsepeft.errors import UserError, unknown_name
from sparsepeft_research.results import RESULTS, ROOT
from sparsepeft_research.tables import (
    bulk,
    federated,
    inference,
    kernels,
    scale,
    scores,
    service,
    spt,
    spt_quality,
    training,
)

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """A generated part: its heading, and what renders it from the folder of results, without the heading."""

    title: str
    render: Callable[[Path], str]


TABLES = {
    "few-shot": Table(
        "Table 3: storage, fine-tuning throughput and scores, trained on a few examples",
        partial(scores.reproduced, folder="few_shot", name="table3"),
    ),
    "full-data": Table(
        "Table 1: storage, device throughput and scores, trained on all data",
        partial(scores.reproduced, folder="full_data", name="table1"),
    ),
    "full-data-bbc": Table("Table 1: BBC News", partial(scores.reproduced, folder="full_data_bbc", name="table1")),
    "full-data-subsets": Table(
        "Table 1: the three large tasks", partial(scores.reproduced, folder="full_data_subsets", name="table1")
    ),
    "few-shot-mpnet": Table(
        "Table 3 on MPNet-base",
        partial(scores.reproduced, folder="all-mpnet-base-v2/few_shot", name="table3"),
    ),
    "few-shot-mpnet-head": Table(
        "Full fine-tuning on 200 examples, its head at SPARTAN's rate",
        partial(scores.reproduced, folder="all-mpnet-base-v2/few_shot_head", name="table3"),
    ),
    "beside-paper": Table(
        "MPNet-base beside the paper's RoBERTa-base",
        partial(scores.beside_paper, folder="all-mpnet-base-v2/few_shot"),
    ),
    "full-data-mpnet": Table(
        "Table 1 on MPNet-base",
        partial(scores.reproduced, folder="all-mpnet-base-v2/full_data", name="table1"),
    ),
    "full-data-mpnet-norms": Table(
        "SPARTAN at twice the rate, its norms at a fifth",
        partial(scores.reproduced, folder="all-mpnet-base-v2/full_data_norms", name="table1"),
    ),
    "labels": Table(
        "On MPNet-base: several labels, and labels of tokens",
        partial(scores.reproduced, folder="all-mpnet-base-v2/labels", name="table1"),
    ),
    "labels-rate": Table(
        "Full fine-tuning on these, at twice its recipe's rate",
        partial(scores.reproduced, folder="all-mpnet-base-v2/labels_1e-4", name="table1"),
    ),
    "labels-head": Table(
        "Full fine-tuning on these, its head at SPARTAN's rate",
        partial(scores.reproduced, folder="all-mpnet-base-v2/labels_head", name="table1"),
    ),
    "labels-norms": Table(
        "SPARTAN on labels of tokens, at twice the rate, its norms at a fifth",
        partial(scores.reproduced, folder="all-mpnet-base-v2/labels_norms", name="table1"),
    ),
    "options": Table("What the options do to scores", scores.options),
    "recipe-search": Table("On MiniLM", scores.recipe_search),
    "recipe-search-mpnet": Table(
        "On MPNet-base", lambda results: scores.recipe_search(results / "all-mpnet-base-v2", "MPNet-base")
    ),
    "parents": Table("What parent cells have learned", scores.parents),
    "finetuning": Table("Fine-tuning throughput", training.throughput),
    "finetuning-steps": Table("Training steps beside AdapterHub's", training.bare_steps),
    "adapterhub": Table("Bottleneck adapters against AdapterHub's", training.adapterhub),
    "inference": Table("Throughput, latency and memory", inference.throughput),
    "runtimes": Table("The bare backbone in other libraries", inference.runtimes),
    "exported": Table(
        "Exported tasks",
        partial(
            inference.exported,
            tasks="tasks of the tables on all data (task, method, seed) on their whole validation sets",
            how="`sparsepeft reproduce table1 --keep-weights`",
        ),
    ),
    "exported-labels": Table(
        "Exported tasks: several labels, and labels of tokens",
        lambda results: inference.exported(
            results / "all-mpnet-base-v2",
            "SPARTAN's tasks of several labels and of labels of tokens, all tokens with their places, on their whole "
            "test parts (`--split test --tolerance 0.01`, see [devices](../devices.md#what-is-checked))",
            "`sparsepeft train --task TASK --recipe best --precision bf16 --max-steps 500 --max-train-samples 10000`",
        ),
    ),
    "memory-read": Table("`ops.memory_read`", kernels.memory),
    "large-memory": Table("Memories of up to 65,536 parents", kernels.large_memory),
    "sparse-attention": Table("Sparse attention alone", kernels.attention),
    "routed-ffn": Table("Routed FFN alone", kernels.feed_forward),
    "gpu": Table("The ops on a GPU", kernels.gpu),
    "processors": Table("Processors", kernels.processors),
    "allocator": Table("Reusing freed memory", kernels.allocator),
    "spt-step": Table("A fine-tuning step with SPT", spt.step),
    "spt-step-memory": Table("The memory of a whole fine-tuning step", spt.step_memory),
    "spt-before-training": Table("What sparse attention costs a real model before training", spt_quality.conversion),
    "spt-after-training": Table("What sparsity costs a real model after fine-tuning", spt_quality.finetuning),
    "spt-budget": Table("Plans within a budget", spt_quality.budget),
    "spt-language-model": Table("What the paper's forms cost: a language model", spt.language_model),
    "spt-encoders": Table("What the paper's forms cost: encoders", spt.encoders),
    "spt-conversion": Table("What the paper's forms cost right after conversion", spt.conversion),
    "begin-token": Table("The begin-of-text token", spt.begin_token),
    "service-load": Table("Twice what the service can answer", service.load),
    "service-speed": Table("The service beside the engine and a server of pipelines", service.speed),
    "service-faults": Table("What can go wrong between the service and its callers", service.faults),
    "service-fuzz": Table("Cases made from the service's description", service.fuzz),
    "processes": Table("", scale.processes),
    "many-tasks": Table("", scale.many_tasks),
    "bulk-speed": Table("Rows a second", bulk.speed),
    "bulk-memory": Table("Memory by rows", bulk.memory),
    # Shorter forms, for pages that are read from start to end.
    "few-shot-overview": Table("", partial(scores.overview, folder="few_shot", name="table3")),
    "full-data-overview": Table("", partial(scores.overview, folder="full_data", name="table1")),
    "inference-factors": Table("", inference.shares),
    # On the page that explains them alone.
    "crashes": Table("", training.crashes),
    "federated": Table("", federated.accuracy),
    "federated-bytes": Table("", federated.sent),
}
# Page -> title and the tables on it.
PAGES = {
    "scores": (
        "Scores and storage",
        (
            *("few-shot-mpnet", "few-shot-mpnet-head", "beside-paper", "full-data-mpnet", "full-data-mpnet-norms"),
            *("labels", "labels-rate", "labels-head", "labels-norms"),
            *("few-shot", "full-data", "full-data-bbc", "full-data-subsets", "options"),
        ),
    ),
    "training": ("Training: throughput, and AdapterHub's adapters", ("finetuning", "finetuning-steps", "adapterhub")),
    "recipes": ("The search for recipes", ("recipe-search", "recipe-search-mpnet")),
    "parents": ("What parent cells have learned", ("parents",)),
    "inference": ("Inference", ("inference", "runtimes", "exported", "exported-labels")),
    "kernels": (
        "Kernels",
        ("memory-read", "large-memory", "sparse-attention", "routed-ffn", "gpu", "processors", "allocator"),
    ),
    "spt": (
        "Sparse fine-tuning (SPT)",
        (
            *("spt-step", "spt-step-memory", "spt-before-training", "spt-after-training", "spt-budget"),
            *("spt-language-model", "spt-encoders", "spt-conversion", "begin-token"),
        ),
    ),
    "bulk": ("Files of many rows", ("bulk-speed", "bulk-memory")),
    "service": ("The service", ("service-load", "service-speed", "service-faults", "service-fuzz")),
}
PICTURES = {"figure2.svg": "figure2/figure2.svg"}
ABOUT = (
    "Generated by `python -m sparsepeft_research.tables` from `research/results`, whose files hold seed, commit, "
    "versions and hardware. Change those, not this page. [All results](../results.md)"
)


def page(name: str, results: Path = RESULTS) -> str:
    """A page of ``docs/results``."""
    title, names = PAGES[name]
    parts = [f"# {title}", ABOUT]
    for table in names:
        parts += [f"## {TABLES[table].title}"] if len(names) > 1 else []
        parts.append(TABLES[table].render(results))
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: Path = RESULTS) -> str:
    """A page with the tables between its markers written anew.

    Raises:
        UserError: a marker names no table.
    """

    def rendered(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise UserError(unknown_name("The table", name, TABLES))
        return f"{start}\n{TABLES[name].render(results)}\n\n{end}"

    return MARKED.sub(rendered, text)


def main(root: Path = ROOT) -> None:
    """Write all of them.

    Raises:
        UserError: ``root`` is no checkout.
    """
    docs, results = root / "docs", root / "research" / "results"
    if not results.is_dir():
        raise UserError(f"{root} has no research/results; run it in a checkout of the repository.")
    for name in PAGES:
        (docs / "results" / f"{name}.md").write_text(page(name, results), encoding="utf-8")
    for name, source in PICTURES.items():
        shutil.copyfile(results / source, docs / "results" / name)
    for path in (root / "README.md", *docs.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = fill(before, results)
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
