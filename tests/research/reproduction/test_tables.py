"""Tables from results written by hand, against means worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.matrices import hand_made_result, hand_made_run
from transformers import RobertaConfig

from sparsepeft.backbones import resolve_model
from sparsepeft.errors import UserError
from sparsepeft.storage.counting import Sizes, load_config
from sparsepeft_research.benchmarks.inference.workloads import architecture
from sparsepeft_research.reproduction import Run, Table, make_table, write_table
from sparsepeft_research.reproduction.paper import METHODS, MISMATCHED, TASKS, paper_figures, paper_rows, paper_storage
from sparsepeft_research.reproduction.render import cells, to_csv, to_markdown
from sparsepeft_research.reproduction.reproduce import read_devices

# By task and method: the score of each seed, then of MRPC the accuracy, of MNLI mismatched.
SCORES = {
    ("rte", "full"): ([0.5, 0.6], []),
    ("mrpc", "full"): ([0.7, 0.8], [0.6, 0.7]),
    ("mnli", "full"): ([0.4, 0.4], [0.5, 0.3]),
    ("rte", "spartan"): ([0.7], []),
    ("mrpc", "spartan"): ([0.9, 0.7], [0.8, 0.6]),
    ("mnli", "spartan"): ([0.5, 0.6], [0.5, 0.6]),
}


def metrics(task: str, score: float, other: float | None) -> dict[str, Any]:
    if task == "mrpc":
        return {"main_metric": "accuracy_f1", "metrics": {"validation": {"accuracy": other, "accuracy_f1": score}}}
    found = {"validation": {"accuracy": score}}
    return {"metrics": found | ({"validation_mismatched": {"accuracy": other}} if task == "mnli" else {})}


def three_tasks(folder: Path, model: str = "minilm", protocol: str = "full-data") -> list[Run]:
    runs = []
    for (task, method), (scores, others) in SCORES.items():
        for seed in (1, 2):
            run = hand_made_run(folder, task, method, seed, protocol=protocol, model=model)
            runs.append(run)
            if seed <= len(scores):
                other = others[seed - 1] if others else None
                hand_made_result(run, scores[seed - 1], **metrics(task, scores[seed - 1], other))
    return runs


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return make_table("table1", three_tasks(tmp_path))


def test_means_and_deviations(table: Table) -> None:
    assert table.tasks == table.common_tasks == ("mrpc", "mnli", "rte")
    full, spartan = table.rows
    assert (full.method, spartan.method) == ("full", "spartan")
    assert full.scores["rte"].mean == pytest.approx(55)
    assert full.scores["rte"].std == pytest.approx(10 / 2**0.5)
    assert (spartan.scores["rte"].n, spartan.scores["rte"].std) == (1, None)
    assert full.scores[MISMATCHED].mean == pytest.approx(40)
    assert full.scores["mrpc-accuracy"].mean == pytest.approx(65)
    assert full.average is not None
    assert full.average.mean == pytest.approx((55 + 75 + 40) / 3)
    assert full.average.std == pytest.approx((60 - 160 / 3) / 2**0.5)  # seed by seed: 53.3 and 60
    assert full.average_as_paper is not None
    assert full.average_as_paper.mean == pytest.approx((55 + 65 + 40) / 3)
    assert spartan.average is not None
    assert spartan.average.mean == pytest.approx((70 + 80 + 55) / 3)
    assert (spartan.average.n, spartan.average.std) == (1, None)  # seed 2 lacks a task


def test_storage_and_speed(table: Table) -> None:
    full, spartan = table.rows
    assert full.storage == pytest.approx(3 * 1300 / 10_000)
    assert spartan.storage == pytest.approx(1 + 3 * 1300 / 10_000)
    assert full.steps_per_minute == pytest.approx(200)
    assert set(spartan.saved_bytes.values()) == {1300}
    assert set(spartan.parameters.values()) == {300}


@pytest.mark.parametrize("why", ["interrupted", "busy machine", "load not known"])
def test_a_run_that_was_not_alone_or_whole_gives_no_speed(tmp_path: Path, why: str) -> None:
    run = hand_made_run(tmp_path, "rte", "full", 1)
    result = hand_made_result(run, 0.5)
    changes = {
        "interrupted": {"reproduction": result["reproduction"] | {"resumed": True}},
        "busy machine": {"others_cpu_share": 0.4},
        "load not known": {"others_cpu_share": None},
    }[why]
    hand_made_result(run, 0.5, **changes)
    table = make_table("table1", [run])
    assert table.rows[0].steps_per_minute is None
    assert any("no run had the machine to itself" in note for note in table.notes)


def test_the_average_is_over_the_tasks_all_methods_have(tmp_path: Path) -> None:
    runs = three_tasks(tmp_path)
    runs.append(hand_made_run(tmp_path, "rte", "lora", 1))
    hand_made_result(runs[-1], 0.3)
    table = make_table("table1", runs)
    assert table.common_tasks == ("rte",)
    assert [row.method for row in table.rows] == ["full", "spartan", "lora"]
    assert [row.average.mean for row in table.rows if row.average] == pytest.approx([55, 70, 30])
    assert any("Not in the averages" in note and "mrpc, mnli" in note for note in table.notes)
    assert any(note == "Not in the paper: lora." for note in table.notes)


def test_all_that_is_not_the_papers_protocol_is_said(tmp_path: Path) -> None:
    values = {"max_train_samples": 500, "max_length": 128, "precision": "bf16", "compile": True, "max_epochs": 3}
    run = hand_made_run(tmp_path, "rte", "spartan", 1, **(values | {"recipe": "best"}))
    hand_made_result(run, 0.5, num_cut=7, notes=["train has 5 of 9 rows"])
    lacking = hand_made_run(tmp_path, "rte", "spartan", 2)
    notes = "\n".join(make_table("table1", [run, lacking]).notes)
    for words in (
        "Missing: 1 of 2 runs, by method, task and seed: spartan on rte (2).",
        "without cola, sst2, mrpc, qqp, stsb, mnli, qnli, wnli",
        "n=1 (1), fewer than the paper's 3",
        "rte: train has 5 of 9 rows.",
        "rte (500 of 1,000)",
        "3 instead of the protocol's 20: rte",
        "cut to 128 tokens: rte",
        "rte 7",
        "Trained in bf16",
        "recipe 'best'",
        "compile=True",
        "not comparable",
        "Device throughput is not measured",
    ):
        assert words in notes
    few = hand_made_run(tmp_path, "rte", "full", 1, protocol="few-shot", num_examples=50, max_steps=10)
    hand_made_result(few, 0.5)
    notes = "\n".join(make_table("table2", [few]).notes)
    assert "Training examples: 50 instead of the paper's 200" in notes
    assert "Steps: 10 instead of the paper's 1000" in notes


def test_the_papers_own_protocol_needs_no_excuse(tmp_path: Path) -> None:
    runs = [hand_made_run(tmp_path, task, "full", seed, model="roberta-base") for task in TASKS for seed in (1, 2, 3)]
    for run in runs:
        hand_made_result(run, 0.5)
    notes = "\n".join(make_table("table1", runs).notes)
    for words in ("Missing", "subset", "Subset", "fewer", "instead", "Other values", "Not in", "Trained in", "recipe"):
        assert words not in notes


def test_the_papers_figures_stand_below_ours_on_its_backbone_alone(tmp_path: Path) -> None:
    assert not make_table("table3", three_tasks(tmp_path / "other", protocol="few-shot")).paper
    table = make_table("table3", three_tasks(tmp_path, model="roberta-base", protocol="few-shot"))
    header, rows = cells(table)
    assert [row[0] for row in rows] == ["full", "full, paper", "spartan", "spartan, paper"]
    ours, paper = (dict(zip(header, row, strict=True)) for row in rows[:2])
    assert paper["mrpc"] == ""  # accuracy and F1, which the paper does not print
    assert (ours["mrpc-accuracy"], paper["mrpc-accuracy"]) == ("65.0 ± 7.1", "77.7")
    assert (ours["mnli-mm"], paper["mnli-mm"]) == ("40.0 ± 14.1", "61.1")
    assert paper["steps/minute"] == "90.1"  # table 2's; table 3 prints 21.3
    assert paper["mean of 3"] == ""
    assert ours["mean, MRPC accuracy"].startswith("53.3")
    assert paper["mean, MRPC accuracy"] == f"{(77.7 + 57.7 + 53.9) / 3:.1f}"


@pytest.mark.parametrize("protocol", ["full-data", "few-shot"])
def test_the_papers_averages_are_those_of_its_columns(protocol: str) -> None:
    rows = paper_rows(protocol)
    assert tuple(rows) == METHODS
    for row in rows.values():
        assert row.average == pytest.approx(statistics.mean(row.scores[task] for task in TASKS), abs=0.06)


def test_table_2_has_the_average_alone_and_table_1_the_devices(tmp_path: Path, table: Table) -> None:
    few = make_table("table2", three_tasks(tmp_path / "few", protocol="few-shot"))
    header, rows = cells(few)
    assert header == ["method", "storage", "steps/minute", "mean of 3", "trained parameters", "bytes per task"]
    assert rows[0] == ["full", "0.39x", "200", "56.7 ± 4.7", "300", "1,300"]
    header, rows = cells(table)
    assert [row[header.index("Raspberry Pi 4")] for row in rows] == ["not measured"] * 2
    assert [row[header.index("rte")] for row in rows] == ["55.0 ± 7.1", "70.0 (n=1)"]
    with pytest.raises(UserError, match="did you mean 'table"):
        make_table("table4", [])


def test_measured_devices_fill_their_columns_on_their_own_backbone(tmp_path: Path) -> None:
    content = {
        "settings": {"device": "raspberry-pi-4", "architecture": architecture(load_config(resolve_model("minilm")))},
        "results": [
            {
                "group": "float32",
                "num_inputs": 32,
                "candidates": {
                    "backbone float32": {"inputs_per_minute": 100.0},
                    "pfeiffer float32": {"inputs_per_minute": 80.0},
                },
            }
        ],
    }
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(content))
    devices = read_devices([path], None)
    assert devices == {"raspberry-pi-4": {"full": 100.0, "pfeiffer": 80.0}}
    table = make_table("table1", three_tasks(tmp_path), devices=devices)
    header, rows = cells(table)
    assert [row[header.index("Raspberry Pi 4")] for row in rows] == ["100.0", "not measured"]  # full, spartan
    assert [row[header.index("iPhone 11")] for row in rows] == ["not measured"] * 2
    assert any("this machine's processor" in note for note in table.notes)
    assert [row["raspberry_pi"] for row in csv.DictReader(io.StringIO(to_csv(table)))] == ["100.0", ""]
    assert read_devices([], "no such model") == {}
    with pytest.raises(UserError, match="other sizes"):
        read_devices([path], "roberta-base")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"benchmark inference --emulate"):
        read_devices([path], None)


def test_files(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    files = write_table(table, tmp_path)
    assert [file.name for file in files] == ["table1.md", "table1.csv", "table1.png", "table1.svg"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    drawn = files[3].read_text()
    assert "spartan" in drawn
    assert "bytes written per task" in drawn
    markdown = to_markdown(table)
    assert files[0].read_text() == markdown
    assert all(f"- {note}\n" in markdown for note in table.notes)
    records = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [record["method"] for record in records] == ["full", "spartan"]
    assert float(records[0]["average"]) == pytest.approx((55 + 75 + 40) / 3, abs=1e-3)
    assert records[1]["rte_std"] == ""
    assert (records[1]["rte_n"], records[1]["bytes_rte"]) == ("1", "1300")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, logger="sparsepeft"):
        assert [file.suffix for file in write_table(table, tmp_path / "plain")] == [".md", ".csv"]
    assert 'pip install "sparsepeft[plots]"' in caplog.text


def test_the_papers_storage_follows_from_its_formulas() -> None:
    printed = {figure.method: figure for figure in paper_figures()}
    assert printed["spartan"].parameters_per_task == 1_179_648 == 2 * (16 + 16 * 3) * 768 * 12
    n = 123_000_000  # the only backbone, to the nearest 10,000, that gives all three printed totals
    assert printed["full"].total_parameters == 9 * n
    for method in ("houlsby", "pfeiffer", "spartan"):
        figure = printed[method]
        assert round((n + 9 * figure.parameters_per_task) / 1e6, 2) == figure.total_parameters / 1e6
        assert round(4 * figure.total_parameters / 1e9, 2) == figure.total_bytes / 1e9  # float32, GB of 10^9
        assert f"{figure.total_parameters / n:.1f}x" == figure.ratio_text


def test_the_papers_storage_is_shown_for_its_backbone_only(tmp_path: Path) -> None:
    assert paper_storage("minilm", 9, 22_713_216, Sizes(12, 8, 16, 3, "model")) == ((), ())
    RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1).save_pretrained(tmp_path)
    figures, notes = paper_storage(str(tmp_path), 2, 124_055_040, Sizes(12, 8, 16, 3, "model"))
    assert figures == paper_figures()
    assert any("1,179,648" in note and "1,032,192" in note for note in notes)
    assert "do not compare" in notes[-1]
