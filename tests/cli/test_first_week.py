"""The first week of someone with support tickets in a CSV, commands as they would type them.

The numbers are those of the list of faults that this walk was written against; each test is one point of it, from the
outside. What lies behind a point is tested where it is built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_cli import Done, sparsepeft
from tests.cli.tickets import DEPARTMENTS, tickets, write_scored_pairs, write_tickets
from tests.tiny import save_tiny_backbone, topics_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """A folder with the tickets and a model, in which the first run was made."""
    folder = tmp_path_factory.mktemp("week")
    (folder / "model").symlink_to(tiny_backbone)
    write_tickets(folder / "tickets.csv")
    write_scored_pairs(folder / "pairs.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        typed("train --train-file tickets.csv --model model --output-dir out/tickets --max-steps 20 --batch-size 8")
        typed(
            "train --train-file pairs.csv --model model --output-dir out/pairs --max-steps 2 --problem-type regression"
        )
    return folder


@pytest.fixture(autouse=True)
def at_work(week: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(week)


def typed(command: str, *more: object, stdin: str = "", code: int = 0) -> Done:
    """Run what was typed, and see how it ended."""
    done = sparsepeft(*command.split(), *more, stdin=stdin)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    if code:
        assert len(done.stderr.strip().splitlines()) >= 1
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


# -- silently wrong or destructive -----------------------------------------------------------------------------------


def test_1_blocks_of_text_begin_as_the_model_knows_them(tiny_language_model: Path, tmp_path: Path) -> None:
    text = topics_text(tmp_path)
    command = f"train --task lm --model {tiny_language_model} --text {text} --block-length 16 --max-steps 1 --json"
    scores = []
    for option in ("--bos-token", "--no-bos-token"):
        done = typed(f"{command} {option} --output-dir {tmp_path / option}")
        scores.append(json.loads(done.stdout)["before"]["dense"]["perplexity"])
    assert scores[0] != scores[1]


def test_2_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("my project")
    for overwrite in ("", " --overwrite"):
        refused(f"train --train-file tickets.csv --model model --output-dir {tmp_path}{overwrite}", "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "my project"


def test_3_a_second_start_is_refused(tmp_path: Path) -> None:
    from sparsepeft.folders import locked

    with locked(tmp_path / "o"):
        command = f"train --train-file tickets.csv --model model --output-dir {tmp_path}/o"
        done = subprocess.run(
            [sys.executable, "-m", "sparsepeft_cli", *command.split()], capture_output=True, text=True
        )
    assert done.returncode == 2
    assert "Another process is writing to" in done.stderr.splitlines()[-1]


def test_4_rows_trained_on_are_not_scored_after_the_data_changed(tmp_path: Path) -> None:
    file = write_tickets(tmp_path / "tickets.csv", 100)
    typed(f"train --train-file {file} --model model --output-dir {tmp_path}/o --max-steps 2")
    before = json.loads(typed(f"evaluate {tmp_path}/o --json").stdout)
    write_tickets(file, 200)
    done = sparsepeft("evaluate", f"{tmp_path}/o", "--json")
    said = done.stderr + done.stdout
    assert "changed" in said
    assert "tickets.csv" in said
    if done.returncode == 0:  # the very rows that were held out were found again
        assert json.loads(done.stdout)["validation"]["accuracy"] == before["validation"]["accuracy"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_5_a_file_is_answered_by_its_columns(tmp_path: Path, form: str) -> None:
    output = tmp_path / f"answers.{form}"
    typed(f"predict out/tickets --file tickets.csv --output {output}")
    lines = output.read_text().splitlines()
    if form == "jsonl":
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 300
        assert rows[6]["id"] in (7, "7")
        assert rows[6]["text"] == tickets(7)[6][1]
        assert rows[6]["label"] in DEPARTMENTS
    else:
        assert len(lines) == 301
        assert lines[0].startswith("id,text,department,")


def test_6_whole_scores_are_noticed_and_can_be_said_to_be_values(tmp_path: Path) -> None:
    command = f"train --train-file pairs.csv --model model --max-steps 1 --json --output-dir {tmp_path}"
    done = json.loads(typed(f"{command}/classes").stdout)
    assert any("regression" in note for note in done["notes"])
    assert json.loads(typed(f"{command}/values --problem-type regression").stdout)["main_metric"] == "pearson_spearman"
    file = tmp_path / "tags.csv"
    lines = [f'"{text}",{"urgent|" if number % 2 else ""}{name}' for number, text, name in tickets(80)]
    file.write_text("\n".join(["text,label", *lines, ""]))
    command = f"train --train-file {file} --model model --max-steps 1 --json --problem-type multi_label"
    assert "f1" in json.loads(typed(f"{command} --output-dir {tmp_path}/tags").stdout)["main_metric"]


# -- the first hour --------------------------------------------------------------------------------------------------


def test_7_another_file_is_scored_from_another_folder(
    week: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tickets(tmp_path / "other.csv", 40)
    monkeypatch.chdir(tmp_path)
    assert "accuracy" in typed(f"evaluate {week}/out/tickets --test-file {other} --json").stdout
    assert "accuracy" in typed(f"evaluate {week}/out/tickets --json").stdout
    assert typed(f"inspect {week}/out/tickets --json").stdout


def test_8_a_run_that_is_written_to_a_file_says_what_it_does(tmp_path: Path) -> None:
    done = typed(f"train --train-file tickets.csv --model model --output-dir {tmp_path}/o --max-steps 8")
    for word in ("spartan", "cpu", "243", "27", "30", "8", "loss"):  # method, device, rows of the parts, steps
        assert word in done.stderr
    assert "\x1b" not in done.stderr


def test_9_a_run_leaves_its_history(tmp_path: Path) -> None:
    lines = rows_of(Path("out/tickets/history.jsonl").read_text())
    assert lines[-1]["step"] == 20
    assert any("loss" in line for line in lines)
    assert "loss" in typed("history out/tickets").stdout
    typed(f"history out/tickets --output {tmp_path}/history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_10_the_card_describes_the_task(week: Path) -> None:
    card = Path("out/tickets/README.md").read_text()
    for word in (*DEPARTMENTS, "accuracy", "tickets.csv", "PeftModel.from_pretrained", "learning_rate"):
        assert word in card
    assert str(week) not in card
    assert "More Information Needed" not in card


def test_11_the_hint_fits_the_task(tmp_path: Path) -> None:
    done = typed(f"train --train-file pairs.csv --model model --max-steps 1 --output-dir {tmp_path}/o")
    hint = next(line for line in done.stdout.splitlines() if line.startswith("next: "))
    assert hint.count('"') == 4


def test_12_no_figure_is_cut_at_80_columns(tmp_path: Path) -> None:
    variables = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    command = ["storage", "--model", "roberta-base"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsepeft_cli", *command], capture_output=True, text=True, env=variables
    )
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_13_what_a_parent_learned_is_no_list_of_stop_words() -> None:
    report = json.loads(typed("inspect out/tickets --split validation --json").stdout)
    words = {word["word"] for layer in report["layers"] for parent in layer["parents"] for word in parent["words"]}
    assert not words & {"the", "i", "my", ".", ",", "and", "(", ")"}
    assert "NMI" in typed("inspect out/tickets").stdout


def test_14_errors_have_the_names_of_where_one_is(tmp_path: Path) -> None:
    command = f"train --train-file tickets.csv --model model --output-dir {tmp_path}/o"
    assert "--max-steps -1" in refused(f"{command} --max-steps -1")
    assert "--text-column" in refused(f"{command} --text-column body")
    assert "lm" in refused(f"train --task tickets --output-dir {tmp_path}/o")
    from sparsepeft.errors import UserError
    from sparsepeft.training import RunConfig

    with pytest.raises(UserError, match="`max_steps=-1`"):
        RunConfig("topics", "o", max_steps=-1)


@pytest.mark.parametrize(
    "wrong",
    [
        "--task sst3",
        "--train-file tickets.csv --text-column body",
        "--task topics --method sparta",
        "--train-file ticket.csv",
    ],
)
def test_15_names_and_files_are_looked_at_before_anything_is_loaded(wrong: str, tmp_path: Path) -> None:
    code = f"""import sys
sys.argv = "sparsepeft train {wrong} --output-dir {tmp_path}/o".split()
from sparsepeft_cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Error: ")


def test_16_every_line_has_its_answer() -> None:
    done = typed("predict out/tickets", stdin="my refund\n\nthe parcel\n", code=1)
    answers = rows_of(done.stdout)
    assert [("error" in answer) for answer in answers] == [False, True, False]
    assert len(str(answers[0]["score"])) <= 8


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_17_methods_of_peft_on_a_model_that_peft_does_not_know(method: str, tmp_path: Path) -> None:
    import transformers as hf

    model = save_tiny_backbone(
        tmp_path / "mpnet",
        build=lambda **values: hf.MPNetForSequenceClassification(hf.MPNetConfig(**values)),
        max_position_embeddings=66,
    )
    typed(f"train --train-file tickets.csv --model {model} --method {method} --max-steps 1 --output-dir {tmp_path}/o")


def test_18_a_failed_start_is_one_sentence_and_blocks_nothing(tmp_path: Path) -> None:
    command = f"train --train-file tickets.csv --model model --max-steps 1 --output-dir {tmp_path}/o"
    refused(f"{command} --learning-rate nan", "--learning-rate nan")
    refused(f"{command} --max-length 9999", "--max-length 9999")
    typed(command)
    refused("train --task topics --model model --output-dir /proc/o", "/proc/o", code=1)


@pytest.mark.parametrize(("delimiter", "encoding"), [(";", "utf-8"), (";", "cp1252"), ("\t", "utf-16")])
def test_19_files_as_spreadsheets_write_them(delimiter: str, encoding: str, tmp_path: Path) -> None:
    file = write_tickets(tmp_path / "tickets.csv", 60, delimiter, encoding)
    file.write_bytes(file.read_bytes().replace("about".encode(encoding)[2:], "ab“ut".encode(encoding)[2:]))
    done = json.loads(typed(f"data {file} --json").stdout)
    assert done["rows"] == 60


def test_19_a_workbook_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tickets.xlsx").write_bytes(b"PK\x03\x04")
    refused(f"train --train-file {tmp_path}/tickets.xlsx --model model --output-dir {tmp_path}/o", "CSV")


def test_21_a_run_can_be_made_again_from_its_own_files(tmp_path: Path) -> None:
    done = typed(f"train --config out/tickets/run.json --output-dir {tmp_path}/o --json")
    assert json.loads(done.stdout)["score"] == json.loads(Path("out/tickets/results.json").read_text())["score"]


def test_22_names() -> None:
    assert typed("--version").stdout.startswith("sparsepeft 0.")
    assert "--num-tasks" in typed("storage --tasks 9").stderr
    assert "--method" in typed("storage --method spartan").stderr


def test_23_the_summary_counts_all_rows(tmp_path: Path) -> None:
    done = typed(f"train --train-file tickets.csv --model model --max-steps 1 --method full --output-dir {tmp_path}/o")
    for count in ("243", "27", "30"):
        assert count in done.stdout
    assert "in the head" not in done.stdout


def test_24_a_plan_estimates_its_time(tmp_path: Path) -> None:
    command = (
        f"reproduce table2 --tasks rte --methods spartan --seeds 42 --model model --output-dir {tmp_path}/o --dry-run"
    )
    if os.environ.get("SPARSEPEFT_DATA"):
        out = typed(f"{command} --data-dir {os.environ['SPARSEPEFT_DATA']}").stdout
        assert "unknown" not in out
    assert not (tmp_path / "o").exists()
    assert "s" in typed(f"train --train-file tickets.csv --model model --output-dir {tmp_path}/p --dry-run").stdout
    assert not (tmp_path / "p").exists()


def test_25_python_says_what_it_wants_in_a_sentence(tiny_backbone: Path) -> None:
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


def test_what_people_expect_who_come_from_other_tools(tmp_path: Path) -> None:
    options = (
        "--class-weights balanced --early-stopping-patience 2 --weight-decay 0.01 --warmup-ratio 0.1 --eval-steps 2"
    )
    typed(f"train --train-file tickets.csv --model model --max-steps 6 {options} --output-dir {tmp_path}/o")
    done = json.loads(typed(f"evaluate {tmp_path}/o --json").stdout)
    assert "confusion_matrix" in json.dumps(done)
    assert "mae" in json.loads(typed("evaluate out/pairs --json").stdout)["validation"]
    assert "--push-to-hub" in typed("train --help").stdout
