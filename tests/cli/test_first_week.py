"""The first week of someone with support tickets in a CSV, commands as they would type them.

Everything is seen from the outside, in a folder where two runs were made; what lies behind is tested where it is built.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_cli import Done, sparsepeft
from tests.cli.tickets import DEPARTMENTS, tickets, write_scored_pairs, write_tickets

pytestmark = pytest.mark.slow

TRAINING = (
    "train --train-file tickets.csv --model model --output-dir out/tickets --max-steps 20 --batch-size 8 "
    "--eval-steps 5 --class-weights balanced --early-stopping-patience 3 --weight-decay 0.01 --warmup-ratio 0.1"
)
PAIRS = "train --train-file pairs.csv --model model --output-dir out/pairs --max-steps 2 --problem-type regression"


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> dict[str, Done]:
    """What the first two trainings printed, in the folder that :func:`at_work` goes to."""
    folder = tmp_path_factory.mktemp("week")
    (folder / "model").symlink_to(tiny_backbone)
    write_tickets(folder / "tickets.csv")
    write_scored_pairs(folder / "pairs.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = {"tickets": typed(TRAINING), "pairs": typed(PAIRS)}
    return printed | {"folder": Done(0, str(folder), "")}


@pytest.fixture(autouse=True)
def at_work(week: dict[str, Done], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(week["folder"].stdout)
    monkeypatch.chdir(folder)
    return folder


def typed(command: str, *more: object, stdin: str = "", code: int = 0, columns: int = 200) -> Done:
    """Run what was typed, and see how it ended."""
    done = sparsepeft(*command.split(), *more, stdin=stdin, columns=columns)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    if code:
        assert done.stderr.strip()
        assert "Traceback" not in done.stderr
    return done


def refused(command: str, *words: str, code: int = 2) -> str:
    """Run what was typed; its one sentence of refusal, which has these words."""
    sentence = typed(command, code=code).stderr.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    for word in words:
        assert word in sentence
    return sentence


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_written_to_a_file_says_what_it_does(week: dict[str, Done]) -> None:
    for word in ("spartan", "cpu", "243", "27", "30", "20", "loss"):  # method, device, rows of the parts, steps
        assert word in week["tickets"].stderr
    assert "\x1b" not in week["tickets"].stderr
    hint = next(line for line in week["pairs"].stdout.splitlines() if line.startswith("next: "))
    assert hint.count('"') == 4  # a pair of texts


def test_what_a_run_leaves(at_work: Path, tmp_path: Path) -> None:
    lines = rows_of(Path("out/tickets/history.jsonl").read_text())
    assert lines[-1]["step"] == 20
    assert any("loss" in line for line in lines)
    assert "loss" in typed("history out/tickets").stdout
    typed(f"history out/tickets --output {tmp_path}/history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000
    for word in (*DEPARTMENTS, "precision", "confusions of validation"):
        assert word in typed("history out/tickets --classes").stdout
    typed(f"history out/tickets --classes --part validation --output {tmp_path}/classes.svg")
    assert next(iter(DEPARTMENTS)) in (tmp_path / "classes.svg").read_text()
    refused("history out/tickets --classes --part tset", "--part", "tset", "validation")
    refused("history out/tickets --part validation", "--part validation goes with --classes")
    card = Path("out/tickets/README.md").read_text()
    for word in (*DEPARTMENTS, "accuracy", "tickets.csv", "PeftModel.from_pretrained", "learning_rate"):
        assert word in card
    assert str(at_work) not in card
    assert "More Information Needed" not in card


def test_a_run_can_be_made_again_from_its_own_files(tmp_path: Path) -> None:
    done = typed(f"train --config out/pairs/run.json --output-dir {tmp_path}/o --json")
    assert json.loads(done.stdout)["score"] == json.loads(Path("out/pairs/results.json").read_text())["score"]


def test_a_failed_start_is_one_sentence_and_blocks_nothing(tmp_path: Path) -> None:
    command = f"train --train-file tickets.csv --model model --max-steps 1 --method full --output-dir {tmp_path}/o"
    refused(f"{command} --learning-rate nan", "--learning-rate nan")
    refused(f"{command} --max-length 9999", "--max-length 9999")
    summary = typed(command).stdout
    assert all(count in summary for count in ("243", "27", "30"))
    assert "in the head" not in summary
    refused("train --task topics --model model --output-dir /proc/o", "/proc/o", code=1)


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project")
    for overwrite in ("", " --overwrite"):
        refused(f"train --train-file tickets.csv --model model --output-dir {tmp_path}{overwrite}", "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "my project"


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    from sparsepeft.folders import locked

    with locked(tmp_path / "o"):
        refused(
            f"train --train-file tickets.csv --model model --output-dir {tmp_path}/o", "Another process is writing to"
        )


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_errors_have_the_names_of_where_one_is() -> None:
    from sparsepeft.errors import UserError
    from sparsepeft.training import RunConfig

    with pytest.raises(UserError, match="`max_steps=-1`"):
        RunConfig("topics", "o", max_steps=-1)


def test_python_says_what_it_wants_in_a_sentence(tiny_backbone: Path) -> None:
    from sparsepeft import MultiTaskEngine
    from sparsepeft.errors import UserError

    engine = MultiTaskEngine(tiny_backbone, {"tickets": "out/tickets"})
    with pytest.raises(UserError, match="task"):
        engine.predict("cola")
    with pytest.raises(UserError, match="on_error"):
        engine.predict([("tickets", "a text")], on_error="rise")
    with pytest.raises(UserError, match="tasks"):
        MultiTaskEngine(tiny_backbone, ["out/tickets"])
    with pytest.raises(UserError, match="cuda:99"):
        MultiTaskEngine(tiny_backbone, device="cuda:99")
    assert len(repr(engine)) < 300


# -- using a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_is_answered_by_its_columns(suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"answers.{suffix}"
    typed(f"predict out/tickets --file tickets.csv --output {output}")
    with output.open(newline="", encoding="utf-8") as file:
        rows: list[Any] = [json.loads(line) for line in file] if suffix == "jsonl" else list(csv.DictReader(file))
    assert len(rows) == 300
    assert list(rows[6])[:3] == ["id", "text", "department"]
    assert int(rows[6]["id"]) == 7
    assert rows[6]["text"] == tickets(7)[6][1]
    assert rows[6]["label"] in DEPARTMENTS


def test_every_line_has_its_answer() -> None:
    done = typed("predict out/tickets", stdin="my refund\n\nthe parcel\n", code=1)
    answers = rows_of(done.stdout)
    assert [("error" in answer) for answer in answers] == [False, True, False]
    assert len(str(answers[0]["score"])) <= 8


def test_another_file_is_scored_from_another_folder(
    at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tickets(tmp_path / "other.csv", 40)
    monkeypatch.chdir(tmp_path)
    assert "accuracy" in typed(f"evaluate {at_work}/out/tickets --test-file {other} --json").stdout
    report = json.loads(typed(f"evaluate {at_work}/out/tickets --json").stdout)
    assert "confusion_matrix" in json.dumps(report)
    assert "mae" in json.loads(typed(f"evaluate {at_work}/out/pairs --json").stdout)["validation"]


def test_what_a_parent_learned_is_no_list_of_stop_words() -> None:
    report = json.loads(typed("inspect out/tickets --split validation --json").stdout)
    words = {word["word"] for layer in report["layers"] for parent in layer["parents"] for word in parent["words"]}
    assert not words & {"the", "i", "my", ".", ",", "and", "(", ")"}
    assert "NMI" in typed("inspect out/tickets").stdout


def test_no_figure_is_cut_at_80_columns() -> None:
    done = typed("storage --model roberta-base", columns=80)
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
