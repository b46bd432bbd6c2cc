"""What is shown on a console is short: the values that were chosen."""

from __future__ import annotations

from sparsepeft import BitFitConfig, SpartanConfig, SptConfig
from sparsepeft.inspection.report import MemoryReport
from sparsepeft.spt.report import SptReport
from sparsepeft.storage import storage_report


def test_configs_show_what_differs_from_their_defaults() -> None:
    assert repr(SpartanConfig(num_parents=4, top_k=2)) == "SpartanConfig(num_parents=4, top_k=2)"
    assert repr(BitFitConfig()) == "BitFitConfig()"
    assert repr(SptConfig(top_l=4, ffn=False)) == "SptConfig(ffn=False, top_l=4)"
    assert SpartanConfig(num_parents=4, top_k=2) == SpartanConfig(num_parents=4, top_k=2)


def test_reports_show_their_main_figures() -> None:
    report = SptReport({"a": 0.5, "b": 1.0}, {"a": 0.1, "b": 0.3}, feed_forward_operations=0.53125)
    assert repr(report) == "SptReport(2 layers, recall 0.750, attention error 0.200, 0.531 of the FFNs' operations)"
    source = {"task": "topics", "split": "test", "examples": 1200}
    assert (
        repr(MemoryReport("default", None, [], source=source))
        == "MemoryReport(0 memories, topics, test of 1,200 texts)"
    )
    shown = repr(storage_report("minilm", 3))
    assert shown.startswith("StorageReport('all-MiniLM-L6-v2")
    assert "3 tasks, float32: full 3" in shown
