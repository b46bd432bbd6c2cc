"""What an inspection found: plain numbers, ready for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsepeft.extras import require
from sparsepeft.inspection.picks import Picks

FORMAT_VERSION = 2  # 1 ranked words by lift and had no z
NMI_AVERAGE = "arithmetic"
MAX_LISTED = 1024  # parents of a memory
MAX_NAMED = 30  # dead parents in a table


@dataclass(frozen=True)
class WordReport:
    """A word that a parent meets more than the others do.

    Attributes:
        word: as the model reads it.
        count: occurrences that went to this parent.
        lift: its share among the parent's words over its share among all words.
        z: how sure that is, see :func:`sparsepeft.inspection.words.log_odds_z`.
    """

    word: str
    count: int
    lift: float
    z: float


@dataclass(frozen=True)
class ParentReport:
    """One parent cell.

    Attributes:
        index: 0 to P - 1.
        share_first: share of the positions at which it had the highest weight.
        share_picked: share of all picks (K a position).
        mean_gate: its mean renormalised weight where picked; None if it never was.
        moved: mean norm of what it adds over the norm of the state, where picked; None if it never was.
        children: where it came first, the share of positions that picked each child most.
        documents: documents that picked it most.
        labels_documents, labels_positions: how many of its documents, and of the positions at which it came first,
            have each label; None without labels.
        purity: share of its documents that have the most frequent label; None without documents or labels.
        words: the words that tell it from the other parents, by z.
    """

    index: int
    share_first: float
    share_picked: float
    mean_gate: float | None
    moved: float | None
    children: list[float]
    documents: int
    labels_documents: dict[str, int] | None
    labels_positions: dict[str, int] | None
    purity: float | None
    words: list[WordReport]

    @property
    def main_label(self) -> str | None:
        """The most frequent label among its documents; None without any."""
        counts = self.labels_documents or {}
        return max(counts, key=lambda label: counts[label]) if any(counts.values()) else None


@dataclass(frozen=True)
class LayerReport:
    """One memory.

    Attributes:
        index: the layer's position in its stack, from 0 (as in ``layers_to_transform``).
        name: the layer's dotted name.
        num_parents, num_children, top_k: P, C and K.
        positions, documents: how many were counted (positions: once for each time the memory is read in a pass).
        nmi_documents: normalised mutual information between a document's label and the parent it picked most; None
            without labels, or with one label only.
        nmi_positions: the same between a position's label (its own, or its document's) and its first parent.
        gate_entropy: mean entropy of the K renormalised weights, in nats; at most ``log(K)``.
        dead_parents: parents that were never among the K.
        moved: mean norm of the whole update over the norm of the state.
        parents: every parent, of more than 1,024 those that were picked most, in the order of their numbers. Parent p
            of product keys is the pair of the halves p // n and p % n, with n * n parents.
    """

    index: int
    name: str
    num_parents: int
    num_children: int
    top_k: int
    positions: int
    documents: int
    nmi_documents: float | None
    nmi_positions: float | None
    gate_entropy: float
    dead_parents: list[int]
    moved: float
    parents: list[ParentReport]

    def label_shares(self, parent: ParentReport) -> dict[str, float]:
        """Of the positions with each label, the share at which a parent comes first; the largest first."""
        counts = parent.labels_positions or {}
        totals = {name: sum((each.labels_positions or {}).get(name, 0) for each in self.parents) for name in counts}
        shares = {name: count / totals[name] for name, count in counts.items() if totals[name]}
        return dict(sorted(shares.items(), key=lambda named: -named[1]))

    def describe_dead(self) -> str:
        """The dead parents for people: of many, how many they are."""
        if len(self.dead_parents) > MAX_NAMED:
            return f"{len(self.dead_parents):,} of {self.num_parents:,}"
        return ", ".join(map(str, self.dead_parents)) or "none"

    def purest_parent(self, min_share: float = 0.1) -> ParentReport | None:
        """The parent with the highest purity among those that hold at least ``min_share`` of the documents."""
        held = [p for p in self.parents if p.purity is not None and p.documents >= min_share * self.documents]
        return max(held, key=lambda parent: parent.purity or 0.0, default=None)


@dataclass(frozen=True)
class MemoryReport:
    """All memories of an adapter over one set of texts.

    Attributes:
        adapter: the adapter's name.
        label_names: by class index; None without labels.
        layers: in the model's order.
        notes: what a reader must know, such as what was left out and why.
        nmi_average: the mean of the two entropies that mutual information is divided by.
        source: where model and texts come from.
        untrained: the same for a fresh memory, if it was asked for.
    """

    adapter: str
    label_names: tuple[str, ...] | None
    layers: list[LayerReport]
    notes: tuple[str, ...] = ()
    nmi_average: str = NMI_AVERAGE
    source: dict[str, Any] = field(default_factory=dict)
    untrained: MemoryReport | None = None
    format_version: int = FORMAT_VERSION

    def __repr__(self) -> str:
        of = "".join(f", {self.source[key]}" for key in ("task", "split") if key in self.source)
        examples = f" of {self.source['examples']:,} texts" if "examples" in self.source else ""
        return f"MemoryReport({len(self.layers)} memories{of}{examples})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self)


def normalized_mutual_information(counts: np.ndarray) -> float | None:
    """Mutual information of two variables over the arithmetic mean of their entropies, from 0 to 1.

    Equal to scikit-learn's ``normalized_mutual_info_score``, from a table of counts.

    Args:
        counts: how often parent p met label l, (P, L).

    Returns:
        None if at most one label occurs: there is then nothing to know.
    """
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    if counts.shape[1] < 2:
        return None
    entropy = require("scipy.stats", "train", "Mutual information").entropy
    information = require("sklearn.metrics", "train", "Mutual information").mutual_info_score(
        None, None, contingency=counts
    )
    mean = (entropy(counts.sum(0)) + entropy(counts.sum(1))) / 2
    return float(np.clip(information / mean, 0.0, 1.0))


def listed_parents(picks: Picks) -> list[int]:
    """The parents that a report has: all, or those that were picked most, in the order of their numbers."""
    return sorted(np.argsort(-picks.picked, kind="stable")[:MAX_LISTED].tolist())


def layer_report(
    index: int, name: str, picks: Picks, labels: Sequence[str], words: list[list[tuple[str, int, float, float]]]
) -> LayerReport:
    """The report of one memory.

    Args:
        picks: its counts.
        labels: names of the classes counted; empty without labels.
        words: (word, count, lift, z) of each parent.
    """
    num_parents, num_children = picks.children.shape
    positions, top_k = max(1, picks.positions), picks.memory.top_k
    return LayerReport(
        index=index,
        name=name,
        num_parents=num_parents,
        num_children=num_children,
        top_k=top_k,
        positions=picks.positions,
        documents=int(picks.documents.sum()),
        nmi_documents=normalized_mutual_information(picks.labelled_documents),
        nmi_positions=normalized_mutual_information(picks.labelled_positions),
        gate_entropy=min(picks.entropy / positions, math.log(top_k)),
        dead_parents=np.flatnonzero(picks.picked == 0).tolist(),
        moved=picks.moved_total / positions,
        parents=[_parent_report(p, picks, labels, words[p]) for p in listed_parents(picks)],
    )


def _parent_report(
    parent: int, picks: Picks, labels: Sequence[str], words: list[tuple[str, int, float, float]]
) -> ParentReport:
    picked, known = int(picks.picked[parent]), int(picks.known_documents[parent])
    documents = picks.labelled_documents[parent]
    return ParentReport(
        index=parent,
        share_first=float(picks.first[parent] / max(1, picks.positions)),
        share_picked=float(picked / max(1, picks.picked.sum())),
        mean_gate=float(picks.gates[parent] / picked) if picked else None,
        moved=float(picks.moved[parent] / picked) if picked else None,
        children=(picks.children[parent] / max(1, picks.first[parent])).tolist(),
        documents=int(picks.documents[parent]),
        labels_documents=_counts(labels, documents, picks.labelled_documents),
        labels_positions=_counts(labels, picks.labelled_positions[parent], picks.labelled_positions),
        purity=float(documents.max() / known) if documents.any() else None,
        words=[WordReport(*word) for word in words],
    )


def _counts(labels: Sequence[str], counts: np.ndarray, all_counts: np.ndarray) -> dict[str, int] | None:
    return dict(zip(labels, counts.tolist(), strict=True)) if all_counts.any() else None
