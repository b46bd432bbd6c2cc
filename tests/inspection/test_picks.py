"""Hand-made picks, whose figures were worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from sparsepeft.inspection import picks as reading
from sparsepeft.inspection.picks import Picks
from sparsepeft.inspection.report import layer_report, normalized_mutual_information
from sparsepeft.layers import SparseMemory

X, Y = [1.0, 0.0], [0.0, 1.0]  # X picks parents 0 and 1 with weights 3/4 and 1/4, Y the other way round
YY = [0.0, 2.0]  # picks parents 1 and 0 with weights 9/10 and 1/10


def memory() -> SparseMemory:
    """Three parents, of which the last is never among the two picked; two equal children each."""
    made = SparseMemory(2, num_parents=3, num_children=2, top_k=2)
    log3 = math.log(3)
    with torch.no_grad():
        made.parent_keys.copy_(torch.tensor([[log3, 0.0], [0.0, log3], [-5.0, -5.0]]))
        made.child_keys.zero_()
        made.child_keys[0, 1] = torch.tensor([0.0, 1.0])  # Y prefers the second child of parent 0, X neither
        made.child_values.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0], [9.0, 9.0]])[:, None].expand(3, 2, 2))
    return made


def count(documents: list[tuple[list[list[float]], int]], made: SparseMemory | None = None) -> Picks:
    """Documents of (states, label), in one batch."""
    picks = Picks(made or memory(), num_classes=2)
    states = torch.tensor([state for document, _ in documents for state in document])
    rows = np.array([row for row, (document, _) in enumerate(documents) for _ in document])
    labels = np.array([label for _, label in documents])
    with torch.inference_mode():
        picks.add(states, rows, len(documents), labels[rows])
    picks.finish_batch(labels)
    return picks


DOCUMENTS = [([X, X, Y], 0), ([Y, Y, Y], 1), ([X, Y], 1), ([X, YY], 0), ([X], 0)]


def test_shares_purity_and_distribution() -> None:
    picks = count(DOCUMENTS)
    report = layer_report(3, "layer.3", picks, ("a", "b"), [[], [("word", 2, 1.5, 3.0)], []])
    zero, one, two = report.parents
    assert (report.positions, report.documents, report.dead_parents) == (11, 5, [2])
    assert [p.share_first for p in report.parents] == pytest.approx([5 / 11, 6 / 11, 0])
    assert [p.share_picked for p in report.parents] == pytest.approx([1 / 2, 1 / 2, 0])
    # The third document is even in picks and weights: lower index. The fourth is even in picks: higher weight.
    assert [p.documents for p in report.parents] == [3, 2, 0]
    assert zero.labels_documents == {"a": 2, "b": 1}
    assert one.labels_documents == {"a": 1, "b": 1}
    assert zero.labels_positions == {"a": 4, "b": 1}
    assert (zero.purity, one.purity, two.purity) == (pytest.approx(2 / 3), 0.5, None)
    assert (zero.main_label, two.main_label) == ("a", None)
    assert report.purest_parent() is zero
    assert report.purest_parent(min_share=0.7) is None
    assert [(word.word, word.count, word.lift, word.z) for word in one.words] == [("word", 2, 1.5, 3.0)]


def test_documents_with_several_labels_count_for_each() -> None:
    """The same documents: of those of parent 0 one has both labels, one has none."""
    rows = [[1, 0], [0, 1], [1, 1], [1, 0], [0, 0]]
    picks = Picks(memory(), num_classes=2)
    states = torch.tensor([state for document, _ in DOCUMENTS for state in document])
    places = np.array([row for row, (document, _) in enumerate(DOCUMENTS) for _ in document])
    with torch.inference_mode():
        picks.add(states, places, len(DOCUMENTS), np.array(rows)[places])
    picks.finish_batch(np.array(rows))
    zero, one, two = layer_report(0, "layer", picks, ("a", "b"), [[]] * 3).parents
    assert [p.documents for p in (zero, one, two)] == [3, 2, 0]
    assert zero.labels_documents == {"a": 2, "b": 1}
    assert one.labels_documents == {"a": 1, "b": 1}
    assert zero.labels_positions == {"a": 4, "b": 1}
    assert one.labels_positions == {"a": 3, "b": 4}
    assert (zero.purity, one.purity, two.purity) == (pytest.approx(2 / 3), 0.5, None)


def test_weights_entropy_and_movement() -> None:
    picks = count([([X, Y], 0), ([YY], 0)])
    report = layer_report(0, "layer", picks, ("a", "b"), [[]] * 3)
    even = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    uneven = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert report.gate_entropy == pytest.approx((2 * even + uneven) / 3)
    assert report.parents[0].mean_gate == pytest.approx((0.75 + 0.25 + 0.1) / 3)
    # Each child's value has norm 4, the states have norms 1, 1 and 2.
    assert report.parents[0].moved == pytest.approx((3 + 1 + 0.4 / 2) / 3)
    assert report.parents[1].moved == pytest.approx((1 + 3 + 3.6 / 2) / 3)
    assert report.moved == pytest.approx((2 * math.sqrt(10) + math.hypot(0.4, 3.6) / 2) / 3)
    assert report.parents[2].mean_gate is None
    assert report.parents[2].moved is None
    assert report.parents[1].children == [1.0, 0.0]
    assert report.nmi_documents is None  # one label only


def test_children_are_counted_where_their_parent_comes_first() -> None:
    both = [1.0, 0.9]  # parent 0 first, whose second child prefers it
    report = layer_report(0, "layer", count([([X, both, both, both, Y], 0)]), ("a", "b"), [[]] * 3)
    assert report.parents[0].children == [0.25, 0.75]


def test_documents_without_counted_positions_are_no_documents() -> None:
    assert count([([X], 0), ([], 1), ([Y], 1)]).documents.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("table", "expected"),
    [([[2, 0], [0, 2]], 1.0), ([[1, 1], [1, 1]], 0.0), ([[3, 3]], 0.0), ([[3], [1]], None), ([[0, 0]], None)],
)
def test_mutual_information_by_hand(table: list[list[int]], expected: float | None) -> None:
    assert normalized_mutual_information(np.array(table)) == (None if expected is None else pytest.approx(expected))


def test_mutual_information_is_that_of_scikit_learn() -> None:
    table = np.array([[3, 1, 0], [0, 4, 2], [0, 0, 0], [5, 0, 1]])
    parents, labels = (np.repeat(places, table[table > 0]) for places in np.nonzero(table))
    assert normalized_mutual_information(table) == pytest.approx(normalized_mutual_info_score(labels, parents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reading_is_what_the_memory_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SparseMemory(16, 6, 3, 4, temperature=1.6, initializer_range=0.5, value_initializer_range=0.5)
    x = torch.randn(50, 16).to(dtype)
    monkeypatch.setattr(reading, "_ENTRIES", 12 * 7)  # 7 positions at a time
    with torch.inference_mode():
        parts = list(reading.read(made, x))
        moved = torch.cat([part.moved_total for _, part in parts])
        expected = (made(x.float()) - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
        scores = x.float() @ made.parent_keys.T
    assert [len(x[rows]) for rows, _ in parts] == [7] * 7 + [1]
    torch.testing.assert_close(moved, expected)
    parents = torch.cat([part.parents for _, part in parts])
    assert torch.equal(parents, scores.argsort(-1, descending=True)[:, :4])
    gates = torch.cat([part.gates for _, part in parts])
    torch.testing.assert_close(gates, scores.topk(4).values.softmax(-1))


def test_equal_scores_go_to_the_lowest_index() -> None:
    made = SparseMemory(2, 4, 1, 2, initializer_range=0)
    with torch.inference_mode():
        ((_, part),) = reading.read(made, torch.ones(1, 2))
    assert part.parents.tolist() == [[0, 1]]
