"""A tag for each token: the files that hold them, what their tags mean, how they are split and scored."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import write_jsonl

from sparsepeft.rows.reading import read_rows
from sparsepeft.tasks import TaskData, TaskError, check_task, few_shot, load_task, split_train, subsample
from sparsepeft.tasks.metrics import report
from sparsepeft.tasks.preview import describe_data

SENTENCES = [
    (("Anna", "Lee", "met", "Bo"), ("B-PER", "I-PER", "O", "B-PER")),
    (("in", "New", "York", "."), ("O", "B-LOC", "I-LOC", "O")),
    (("#NYC", "rocks"), ("B-LOC", "O")),
    (("nothing", "here"), ("O", "O")),
]
NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def conll(path: Path, sentences: Any = SENTENCES, between: str = "\t", middle: str = "") -> Path:
    """Write a file with a token a line."""
    text = "\n".join(
        "".join(f"{token}{between}{middle}{tag}\n" for token, tag in zip(*sentence, strict=True))
        for sentence in sentences
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path: Path, **options: Any) -> TaskData:
    return load_task("custom", train_file=path, validation_file=path, **options)


def parquet(path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    tags = datasets.List(datasets.ClassLabel(names=list(reversed(NAMES))))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [list(tokens) for tokens, _ in SENTENCES], "ner_tags": [list(tags) for _, tags in SENTENCES]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


@pytest.mark.parametrize("how", ["tab.conll", "space.bio", "wide.iob", "packed.iob2.gz", "rows.jsonl", "rows.parquet"])
def test_every_way_to_write_them(tmp_path: Path, how: str) -> None:
    path = tmp_path / how
    if how.endswith("jsonl"):
        write_jsonl(path, [{"id": 7, "words": tokens, "tags": tags} for tokens, tags in SENTENCES])
    elif how.endswith("parquet"):
        parquet(path)
    else:
        conll(path, between="\t" if how == "tab.conll" else "  ", middle="NN -X- " if how == "wide.iob" else "")
    check_task(None, train_file=path)
    data = load(path)
    assert (data.spec.problem_type, data.spec.label_names) == ("token_classification", NAMES)
    assert data.spec.main_metric == "f1"
    assert data.train["tokens"][:] == [list(tokens) for tokens, _ in SENTENCES]
    assert data.train["text"][:] == [" ".join(tokens) for tokens, _ in SENTENCES]
    assert data.train["label"][:] == [[NAMES.index(tag) for tag in tags] for _, tags in SENTENCES]
    about = describe_data(data)
    assert about["parts"]["train"]["labels"] == {"O": 6, "B-LOC": 2, "I-LOC": 1, "B-PER": 2, "I-PER": 1}
    assert about["parts"]["train"]["examples"][0]["label"][0] in NAMES


def test_documents_and_comments_are_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text(
        "-DOCSTART- -X- O O\n\n# text = Anna in Rome\nAnna NNP x B-PER\n# sic\n# # # O\n\n \nRome NNP x B-LOC\n"
        "-DOCSTART- -X- O O\nHere RB x O\n\n"
    )
    rows = load(path).train
    assert rows["tokens"][:] == [["Anna", "#"], ["Rome"], ["Here"]]


def test_iob1_becomes_iob2_and_a_lone_i_is_an_entity(tmp_path: Path) -> None:
    iob1 = [(("Anna", "Bo", "x", "Rome"), ("I-PER", "B-PER", "O", "I-LOC")), (("a", "Rome"), ("O", "I-LOC"))]
    data = load(conll(tmp_path / "iob1.conll", iob1))
    assert [[data.spec.label_names[tag] for tag in row] for row in data.train["label"][:]] == [  # type: ignore[index]
        ["B-PER", "B-PER", "O", "B-LOC"],
        ["O", "B-LOC"],
    ]
    assert any("is in IOB1" in note and "turned into IOB2" in note for note in data.notes)
    iob2 = [(("Anna", "Bo", "x", "Rome"), ("B-PER", "B-PER", "O", "B-LOC")), (("a", "Rome"), ("O", "B-LOC"))]
    for train, validation in ((iob2, iob1), (iob1, iob2)):  # each file by itself
        files = conll(tmp_path / "train.conll", train), conll(tmp_path / "dev.conll", validation)
        data = load_task("custom", train_file=files[0], validation_file=files[1])
        assert data.train["label"][:] == data.validation["label"][:]
        assert ["dev.conll is in IOB1" in note for note in data.notes if "IOB1" in note] == [validation is iob1]
    mixed = [(("Anna", "Lee", "Rome"), ("B-PER", "I-PER", "I-LOC")), (("a", "b"), ("O", "O"))]
    data = load(conll(tmp_path / "mixed.conll", mixed))
    assert data.train["label"][0] == [NAMES.index(tag) for tag in mixed[0][1]]
    assert any("1 entities of mixed.conll begin with I- and not with B-" in note for note in data.notes)
    single = [(("Anna", "in", "Rome"), ("S-PER", "O", "S-LOC")), (("New", "York"), ("B-LOC", "E-LOC"))]
    names = load(conll(tmp_path / "iobes.conll", single)).spec.label_names
    assert names == ("O", *(f"{place}-{kind}" for kind in ("LOC", "PER") for place in "BIES"))


def test_tags_that_mark_no_entities_are_classes_of_tokens(tmp_path: Path) -> None:
    speech = [(("a", "dog", "barks"), ("DET", "NOUN", "VERB")), (("dogs", "bark"), ("NOUN", "VERB"))]
    data = load(conll(tmp_path / "train.conll", speech))
    assert (data.spec.label_names, data.spec.main_metric) == (("DET", "NOUN", "VERB"), "accuracy")
    assert any("mark no entities" in note for note in data.notes)
    labels = np.array([[0, 1, 2], [1, 2, -100]])
    logits = np.eye(3)[[[0, 1, 1], [1, 2, 0]]]
    assert data.spec.compute_metrics(logits, labels)["accuracy"] == pytest.approx(4 / 5)
    assert report(data.spec, logits, labels)["per_class"]["VERB"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "support": 2,
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.conll", "Anna\tB-PER\nLee\n", r"a.conll:2: found 1 column\(s\); expected 2"),
        ("a.conll", "Anna\tB-PER\n\tO\n", "a.conll:2: the token is empty"),
        ("a.conll", "Anna\tB-PER\nLee\t \n", "a.conll:2: the tag is empty"),
        ("a.conll", "Anna\nLee\n", "has one column, 'tokens'; expected tokens and a tag for each, add"),
        ("a.conll", "\n\n", "a.conll has no rows"),
        ("a.conll", "Anna\tO\nLee\tO\n", "every tag is 'O'; expected at least two"),
        ("a.jsonl", [{"tokens": ["a"], "tags": ["B-X"]}, {"tokens": [], "tags": []}], "a.jsonl:2: the sentence is em"),
        ("a.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "B-X", "O"]}], "a.jsonl:1: 2 tokens have 3 tags; expected a"),
        ("a.jsonl", [{"tokens": ["a"], "tags": [3]}], r"a.jsonl:1: tags is \[3\]; expected .*write the names"),
        ("a.jsonl", [{"tokens": ["a", " "], "tags": ["O", "B-X"]}], "a.jsonl:1: tokens has an empty text"),
        ("a.jsonl", [{"tokens": ["\ud800"], "tags": ["O"]}], "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: Any, words: str) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        write_jsonl(path, content)
    with pytest.raises(TaskError, match=words):
        load(path)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    path = conll(tmp_path / "train.conll")
    other = conll(tmp_path / "other.conll", [(("a", "b", "c"), ("O", "O", "B-ORG"))])
    with pytest.raises(TaskError, match=r"other.conll:1: 'B-ORG' is no tag of this task; expected 'O', 'B-LOC'"):
        load_task("custom", train_file=path, validation_file=other)
    table = tmp_path / "table.csv"
    table.write_text("text,label\na,b\n")
    lists = write_jsonl(tmp_path / "lists.jsonl", [{"pieces": ["a"], "kinds": ["O"]}])
    wrong: list[tuple[Path, dict[str, str], str]] = [
        (path, {"problem_type": "multi_label"}, "was given, but .* has tokens with tags; leave it out"),
        (path, {"delimiter": "tab"}, "`delimiter=tab` was given, but .* has none"),
        (path, {"label_column": "ner"}, "`label_column=ner` was given; the columns are 'tokens', 'tags'"),
        (path, {"text_column": "tokens", "text_pair_column": "tags"}, "tokens come in one list; leave it out"),
        (table, {"problem_type": "token_classification"}, "is a table of texts; pass a .conll file"),
        (lists, {"problem_type": "token_classification"}, "which column has the tokens"),
        (path, {"problem_type": "tokens"}, "expected regression, single_label, multi_label or token_classification"),
    ]
    for file, options, words in wrong:
        with pytest.raises(TaskError, match=words):
            load_task("custom", train_file=file, **options)  # type: ignore[arg-type]


def test_a_text_beside_its_tokens_stays_a_text(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "tokens": ["a", "b", "c"], "labels": [name]} for i, name in enumerate("xyxy")]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    assert load(path).spec.problem_type == "multi_label_classification"
    entities = [{"text": "Anna x", "tokens": ["Anna", "x"], "ner_tags": ["B-PER", "O"]}]
    assert load(write_jsonl(tmp_path / "b.jsonl", entities)).spec.problem_type == "token_classification"


def test_files_of_tokens_may_call_their_columns_otherwise(tmp_path: Path) -> None:
    rows = {"words": [list(tokens) for tokens, _ in SENTENCES], "ner": [list(tags) for _, tags in SENTENCES]}
    lists = write_jsonl(
        tmp_path / "a.jsonl", [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    )
    file = conll(tmp_path / "b.conll")
    named = {"train_file": lists, "validation_file": file, "label_column": "ner"}
    data = load_task("custom", **named)  # type: ignore[arg-type]
    assert data.validation["label"][:] == data.train["label"][:]
    others = write_jsonl(tmp_path / "d.jsonl", [{"tokens": ["a"], "labels": ["O"]}])
    assert len(load_task("custom", train_file=file, validation_file=others).validation) == 1
    with pytest.raises(TaskError, match="`label_column=ner` was given; the columns are 'tokens', 'labels'"):
        load_task("custom", **(named | {"validation_file": others}))  # type: ignore[arg-type]
    for label in ("ner,", ["ner"]):  # of the lists alone, as a CoNLL file has no names
        data = load_task("custom", train_file=file, validation_file=lists, text_column="words", label_column=label)
        assert data.validation["label"][:] == data.train["label"][:]
        assert load_task("custom", train_file=lists, validation_file=lists, label_column=label).spec.labels_tokens
    alone = tmp_path / "e.conll"
    alone.write_text("Anna\nLee\n")
    with pytest.raises(TaskError, match="has one column, 'tokens'; expected tokens and a tag for each, add the tags"):
        load_task("custom", train_file=file, validation_file=alone)


def test_sentences_are_split_by_their_rarest_tag(tmp_path: Path) -> None:
    many = [*[(("a", "b"), ("O", "O"))] * 60, *[(("c", "d"), ("B-PER", "O"))] * 30, *[(("e",), ("B-LOC",))] * 10]
    data = load(conll(tmp_path / "train.conll", many))

    def kinds(part: Any) -> dict[str, int]:
        firsts = [row[0] for row in part["tokens"][:]]
        return {token: firsts.count(token) for token in "ace"}

    rest, held = split_train(data.train, data.spec)
    assert (kinds(held), kinds(rest)) == ({"a": 6, "c": 3, "e": 1}, {"a": 54, "c": 27, "e": 9})
    assert kinds(few_shot(data.train, data.spec, 20, seed=1)) == {"a": 12, "c": 6, "e": 2}
    assert kinds(subsample(data.train, 50)) == {"a": 30, "c": 15, "e": 5}
    alone = load_task("custom", train_file=tmp_path / "train.conll")
    assert kinds(alone.validation) == {"a": 6, "c": 3, "e": 1}


def test_entities_count_whole(tmp_path: Path) -> None:
    spec = load(conll(tmp_path / "train.conll")).spec
    true = ["B-PER I-PER O B-LOC", "B-LOC I-LOC I-LOC", "I-PER O"]  # the last begins with I-, and counts
    guess = ["B-PER I-PER O B-PER", "B-LOC I-LOC O", "B-PER O"]  # right, another type, too short, right
    labels, logits = np.full((3, 5), -100), np.zeros((3, 5, 5))
    for row, (tags, guesses) in enumerate(zip(true, guess, strict=True)):
        for column, (tag, guessed) in enumerate(zip(tags.split(), guesses.split(), strict=True)):
            labels[row, column] = NAMES.index(tag)
            logits[row, column, NAMES.index(guessed)] = 1
    scores = spec.compute_metrics(logits, labels)
    assert list(scores) == ["f1", "precision", "recall", "accuracy"]
    assert scores == pytest.approx({"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 6 / 9})
    assert report(spec, logits, labels)["per_class"] == {
        "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2},
        "PER": {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "support": 2},
    }
    nothing = np.eye(5)[np.zeros((3, 5), int)]
    assert spec.compute_metrics(nothing, labels)["f1"] == 0
    assert spec.compute_metrics(nothing, np.where(labels < 0, labels, 0)) == {
        "f1": 0.0,
        "precision": 0.0,
        "recall": 0.0,
        "accuracy": 1.0,
    }
    logits[0, 0] = np.nan  # no answer is no entity, and not right
    assert spec.compute_metrics(logits, labels)["recall"] == pytest.approx(1 / 4)
    with pytest.raises(TaskError, match=r"expected \(N, T, 5\) and \(N, T\)"):
        spec.compute_metrics(logits[0], labels[0])


def test_wnut17(data_dir: Path, tmp_path: Path) -> None:
    data = load_task("wnut17", data_dir=data_dir)
    assert data.test is not None
    assert [len(part) for part in (data.train, data.validation, data.test)] == [3394, 1009, 1287]
    people = data.spec.label_names.index("B-person")  # type: ignore[union-attr]
    assert sum(row.count(people) for row in data.test["label"][:]) == 429
    assert not data.notes
    assert data.fingerprints.keys() == {"wnut17/train.conll.gz", "wnut17/dev.conll", "wnut17/test.conll"}
    with pytest.raises(TaskError, match=r"has no train\.conll"):
        check_task("WNUT-17", data_dir=tmp_path)
    with pytest.raises(TaskError, match="is read from files; pass `data_dir`"):
        load_task("wnut17", source="hub")


def test_json_lists_of_both(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"tokens": tokens, "labels": tags} for tokens, tags in SENTENCES]))
    assert load(path).spec.label_names == NAMES


def test_comments_beside_hashtags(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("# global\nAnna\tB-PER\n#here\tO\n\n# sent_id = 4\nBob\tB-PER\n")
    assert [row.values["tokens"] for row in read_rows(path)] == [["Anna", "#here"], ["Bob"]]
    path.write_text("# id = 4\nAnna x x B-PER\n# one two O\n")
    assert [row.values["tokens"] for row in read_rows(path)] == [["Anna", "#"]]
