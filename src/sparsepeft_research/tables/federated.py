"""Tables of memories that a federation trains: what travels, and what comes of it."""

from __future__ import annotations

import statistics
from pathlib import Path

from sparsepeft_research.markdown import paragraphs, table
from sparsepeft_research.results import Result, read_result

_PARTITIONS = {"topic": "a topic each", "random": "at random"}
_METHODS = {"spartan": "SPARTAN: memories and head", "lora": "LoRA of rank 8, and head", "full": "full fine-tuning"}


def sent(results: Path) -> str:
    """What a client receives and sends in a round, by method."""
    parts = read_result(results / "federated.json").results
    # Of the last round: in the first, equal tensors, such as LoRA's zeros, are sent once.
    rounds = {method: _last(parts[f"bytes-{method}"]["train"]) for method in _METHODS}
    total = {method: measured["bytes-down"] + measured["bytes-up"] for method, measured in rounds.items()}
    rows = []
    for method, title in _METHODS.items():
        megabytes = [f"{rounds[method][name] / 1e6:.2f}" for name in ("bytes-down", "bytes-up")]
        trained = f"{parts[f'bytes-{method}']['parameters']['trained']:,}"
        rows.append([title, trained, *megabytes, f"{total[method] / total['full']:.2%}"])
    return paragraphs(
        table(
            ["a client and a round", "trained parameters", "received (MB)", "sent (MB)", "of full fine-tuning"], rows
        ),
        "Measured on the messages, as Flower serializes them; what HTTP adds is left out.",
    )


def accuracy(results: Path) -> str:
    """By round, beside central training's and each client's alone."""
    report = read_result(results / "federated.json")
    settings = report.settings
    return paragraphs(
        f"Accuracy (%) on the test part of {settings['task']}, which no client has. {settings['clients']} clients, "
        f"MiniLM, SPARTAN (memories and head); {report.results['central']['num_rows']} training texts in all, cut to "
        f"{settings['max_length']} tokens; {settings['local_epochs']:g} local epoch in a round, batches of "
        f"{settings['batch_size']}, learning rate {settings['lr']:g}, {settings['precision']}, one seed. Central "
        "training takes as many steps as all clients together, a client alone as many as in the federation. FedAvgM "
        "has a momentum of 0.5 where it names no other, FedProx a mu of 0.1. Rounds cut in three are thrice as many, "
        "with a third of the work and all of the bytes each; they are shown after as many steps as the others.",
        _accuracy(report),
        "By `python -m sparsepeft_research.experiments.federated --data-dir DATA`.",
    )


def _accuracy(report: Result) -> str:
    parts, rounds = report.results, report.settings["rounds"]
    rows = []
    for partition, title in _PARTITIONS.items():
        for name, part in parts.items():
            if name.startswith(f"{partition}-") and "train" in part:
                cut_in = part["values"]["num-rounds"] // rounds
                scores = [_percent(part["test"][str(number * cut_in)]) for number in range(rounds + 1)]
                rows.append([f"{title}, {name.partition('-')[2]}", *scores])
        alone = [100 * client["test"]["accuracy"] for client in parts[f"{partition}-alone"]["clients"]]
        summary = f"{statistics.mean(alone):.1f} ({min(alone):.1f} to {max(alone):.1f})"
        rows.append([f"{title}, each client alone: mean (least to most)", *[""] * rounds, summary])
    rows.append(["central training", *[""] * rounds, _percent(parts["central"]["test"])])
    return table(["texts of a client", "at first", *(f"round {number}" for number in range(1, rounds + 1))], rows)


def _last(rounds: dict[str, dict[str, float]]) -> dict[str, float]:
    return rounds[max(rounds, key=int)]


def _percent(metrics: dict[str, float]) -> str:
    return f"{100 * metrics['accuracy']:.1f}"
