"""MultiTaskEngine: every row gets what its task alone gives, whatever runs beside it."""

from __future__ import annotations

import cProfile
import gc
import json
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.inference.conftest import TASKS, save_task
from tests.models import METHODS
from tests.tiny import save_tiny_backbone, topics_rows
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from sparsepeft import HeadConfig, MultiTaskEngine
from sparsepeft.errors import UserError
from sparsepeft.inference import Prediction, answering

TEXTS = [" ".join(row["text"].split()[: 3 + 5 * (i % 6)]) for i, row in enumerate(topics_rows("test")[:24])]


def alone(backbone: Path, folder: Path, text: str | tuple[str, str]) -> np.ndarray:
    """Probabilities (or the value) by the task's own model, one unpadded row at a time."""
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(backbone), str(folder)).eval()
    texts = (text,) if isinstance(text, str) else text
    inputs = AutoTokenizer.from_pretrained(backbone)(*texts, return_tensors="pt", truncation=True)
    with torch.inference_mode():
        logits = model(**inputs).logits[0]
    return (logits if len(logits) == 1 else logits.softmax(-1)).numpy()


def values(prediction: Prediction) -> list[float]:
    assert prediction.error is None
    return list(prediction.scores.values()) or [prediction.score]


@pytest.fixture(scope="module")
def expected(backbone: Path, folders: dict[str, Path]) -> dict[tuple[str, str], np.ndarray]:
    return {(name, text): alone(backbone, folders[name], text) for name in TASKS for text in TEXTS[:6]}


def test_each_row_equals_its_task_alone(engine: MultiTaskEngine, expected: dict[tuple[str, str], np.ndarray]) -> None:
    requests = [(name, text) for text in TEXTS[:6] for name in TASKS]  # tasks and lengths interleaved
    answers = engine.predict(requests)
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(values(answer), expected[request], rtol=1e-4, atol=1e-5)
        if answer.scores:
            assert answer.label == max(answer.scores, key=answer.scores.__getitem__)
        else:
            assert (request[0], answer.label) == ("degree", None)


@pytest.mark.parametrize("tasks", [None, ["degree", "upper"], ["upper"], ["two", "upper", "pfeiffer"]])
def test_all_tasks_of_each_text_equal_the_tasks_alone(
    engine: MultiTaskEngine, expected: dict[tuple[str, str], np.ndarray], tasks: list[str] | None
) -> None:
    for text, answers in zip(TEXTS[:6], engine.predict_all(TEXTS[:6], tasks), strict=True):
        assert list(answers) == list(tasks or TASKS)
        for name, answer in answers.items():
            np.testing.assert_allclose(values(answer), expected[name, text], rtol=1e-4, atol=1e-5)


def test_lower_layers_run_once_for_all_tasks(engine: MultiTaskEngine) -> None:
    layers = {name: [] for name in (0, 1)}
    model = engine._views["SPARTAN"].model
    hooks = []
    for index, rows in layers.items():
        attention = model.get_submodule(f"bert.encoder.layer.{index}").base_layer.attention
        hooks.append(attention.register_forward_hook(lambda m, a, o, rows=rows: rows.append(len(o[0]))))
    engine.predict_all(TEXTS[:2], ["upper", "degree"])
    for hook in hooks:
        hook.remove()
    assert sum(layers[0]) == 2
    assert sum(layers[1]) == 4


_UPPERMOST = {
    "albert": HeadConfig(num_labels=3, task_type="SEQ_CLS"),  # its layers are one, run several times
    "gpt2": METHODS["spartan"](num_labels=3, layers_to_transform=[1]),
    "t5": METHODS["spartan"](num_labels=3, layers_to_transform=[1]),
}


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "albert"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers as hf

    sizes = {"eos_token_id": 3, "bos_token_id": 2}  # [SEP] ends an input
    build = {
        "albert": lambda **c: hf.AlbertModel(hf.AlbertConfig(**c, embedding_size=16)),
        "gpt2": lambda **c: hf.GPT2Model(hf.GPT2Config(**c, n_positions=64)),
        "t5": lambda **c: hf.T5Model(
            hf.T5Config(**c, d_model=32, num_layers=2, d_kv=8, d_ff=64, decoder_start_token_id=0)
        ),
    }[architecture]
    backbone = save_tiny_backbone(tmp_path / "backbone", build=build, **sizes)
    folders = {
        "all": save_task(backbone, tmp_path / "all", METHODS["spartan"](num_labels=2)),
        "upper": save_task(backbone, tmp_path / "upper", _UPPERMOST[architecture], 1),
    }
    engine = MultiTaskEngine(backbone, folders)
    for text, answers in zip(TEXTS[:4], engine.predict_all(TEXTS[:4]), strict=True):
        for name, answer in answers.items():
            np.testing.assert_allclose(values(answer), alone(backbone, folders[name], text), rtol=1e-3, atol=1e-4)


BAD_INPUTS = {
    "empty text": [" ", (TEXTS[0], "")],
    "expected a text, a pair of texts, or a dictionary": [
        *(None, 3, 0.5, float("nan"), b"bytes", [], (), ["a"] * 3, ("a", None), ["a", ["b"]], {}),
        *({"text": None}, {"text": 1}, {"text_pair": "a"}, {"text": "a", "label": 0}),
    ],
    "half of a surrogate pair": ["bad \ud83d", ("good", "\udc00"), {"text": "\ud83d"}],
}


def test_a_tokenizer_set_to_pad_on_the_left_moves_no_position(tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "backbone", padding_side="left")
    engine = MultiTaskEngine(backbone, {"two": save_task(backbone, tmp_path / "two", TASKS["two"])})
    texts = ["bread", "the minister of the north met the team and the bank"]
    together = engine.predict([("two", text) for text in texts])
    for text, answer in zip(texts, together, strict=True):
        assert answer.score == pytest.approx(engine.predict([("two", text)])[0].score, abs=1e-6)


def test_bad_rows_do_not_stop_the_others(engine: MultiTaskEngine) -> None:
    good, (first, second) = engine.predict([("two", TEXTS[0])]), TEXTS[:2]
    bad = [(("two", given), words) for words, inputs in BAD_INPUTS.items() for given in inputs]
    bad += [(("tow", first), "did you mean 'two'"), ("two", "expected (task, text)"), (None, "expected (task, text)")]
    answers = engine.predict([one for request, _ in bad for one in (("two", first), request)])  # type: ignore[misc]
    for answer, (request, words) in zip(answers[1::2], bad, strict=True):
        assert words in str(answer.error)
        assert np.isnan(answer.score)
        assert answer.label is None
        with pytest.raises(UserError, match=re.escape(words)):
            engine.predict([("two", first), request], on_error="raise")  # type: ignore[list-item]
    for answer in answers[::2]:
        np.testing.assert_allclose(values(answer), values(good[0]), rtol=1e-5)
    inputs = [given for one in BAD_INPUTS.values() for given in one]
    of_all = engine.predict_all([first, *inputs], ["two", "degree"])  # type: ignore[list-item]
    assert [{str(one.error)[:9] for one in of_input.values()} for of_input in of_all] == [
        {"None"},
        *({"An input "} for _ in inputs),
    ]
    assert list(engine.predict_all([None])[0]) == list(TASKS)  # type: ignore[list-item]
    pairs: list[Any] = [(first, second), [first, second], {"text": first, "text_pair": second}]
    assert len({str(values(one)) for one in engine.predict([("five", pair) for pair in pairs])}) == 1
    singles: list[Any] = [first, (first,), {"text": first}, {"text": first, "text_pair": None}]
    assert [values(one) for one in engine.predict([("two", text) for text in singles])] == [values(good[0])] * 4


def test_one_input_is_a_list_of_one(engine: MultiTaskEngine) -> None:
    for given in (TEXTS[0], {"text": TEXTS[0]}):
        (answer,) = engine.predict_all(given, "two")
        np.testing.assert_allclose(values(answer["two"]), values(engine.predict([("two", TEXTS[0])])[0]), rtol=1e-5)
    assert engine.predict([]) == engine.predict_all([]) == []
    for ask in (engine.predict, engine.predict_all):
        for given in (None, 3, b"text"):
            with pytest.raises(UserError, match="expected a list of inputs"):
                ask(given)  # type: ignore[arg-type]


def test_memory_is_bounded_by_the_budget(engine: MultiTaskEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "WINDOW", 64)
    largest: list[int] = []
    hooks = [
        view.model.bert.embeddings.register_forward_hook(lambda m, a, o: largest.append(o.shape[0] * o.shape[1]))
        for view in engine._views.values()
    ]
    texts = [TEXTS[i % len(TEXTS)] for i in range(240)]
    answers = engine.predict(("head" if i % 2 else "two", text) for i, text in enumerate(texts))
    for hook in hooks:
        hook.remove()
    assert len(answers) == 240
    assert max(largest) <= 64
    assert [a.label for a in answers[:24]] == [a.label for a in answers[216:]]


def test_bfloat16_answers_nearly_the_same(
    backbone: Path, folders: dict[str, Path], expected: dict[tuple[str, str], np.ndarray]
) -> None:
    engine = MultiTaskEngine(backbone, folders, token_budget=64, dtype=torch.bfloat16)
    requests = [(name, text) for text in TEXTS[:6] for name in TASKS]
    differences = [
        np.abs(values(answer) - expected[request]).max()
        for request, answer in zip(requests, engine.predict(requests), strict=True)
    ]
    assert 0 < max(differences) < 0.05


# -- changing tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [1, 3])
def test_labels_that_do_not_exclude_each_other(backbone: Path, tmp_path: Path, num_labels: int) -> None:
    config = METHODS["spartan"](num_labels=num_labels, problem_type="multi_label_classification")
    engine = MultiTaskEngine(backbone, {"several": save_task(backbone, tmp_path / "several", config)})
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(backbone), str(tmp_path / "several")
    ).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(backbone)(TEXTS[0], return_tensors="pt")).logits[0]
    (answer,) = engine.predict([("several", TEXTS[0])])
    np.testing.assert_allclose(list(answer.scores.values()), logits.sigmoid().numpy(), rtol=1e-4, atol=1e-5)


def test_tasks_come_and_go(
    changing_engine: MultiTaskEngine, backbone: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = changing_engine
    before = values(engine.predict([("two", TEXTS[0])])[0])
    newer = save_task(backbone, tmp_path / "newer", METHODS["spartan"](num_labels=2), seed=7)
    engine.replace("two", newer)
    after = values(engine.predict([("two", TEXTS[0])])[0])
    np.testing.assert_allclose(after, alone(backbone, newer, TEXTS[0]), rtol=1e-4, atol=1e-5)
    assert not np.allclose(before, after)
    with pytest.raises(UserError, match="loaded already"):
        engine.add("two", newer)
    engine.remove("two")
    assert "two" not in engine.tasks
    assert "unknown" in str(engine.predict([("two", TEXTS[0])])[0].error)
    for name in ("remove", "replace"):
        with pytest.raises(UserError, match="unknown"):
            getattr(engine, name)("two", *([newer] if name == "replace" else []))
    engine.add("two", folders["two"])
    np.testing.assert_allclose(values(engine.predict([("two", TEXTS[0])])[0]), before, rtol=1e-6)


def test_what_was_removed_leaves_memory(changing_engine: MultiTaskEngine, folders: dict[str, Path]) -> None:
    engine = changing_engine

    def num_values() -> int:
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if type(one) is torch.nn.Parameter)

    before = num_values()
    for _ in range(3):
        engine.replace("five", folders["five"])
    assert num_values() == before
    for name in ("five", "pfeiffer", "bitfit", "head"):
        engine.remove(name)
        before, larger = num_values(), before
        assert before < larger


def test_the_hundredth_task_costs_what_the_first_does(
    changing_engine: MultiTaskEngine, folders: dict[str, Path]
) -> None:
    engine = changing_engine

    def num_calls(change: Callable[[], None]) -> int:
        with cProfile.Profile() as profile:
            change()
        return sum(entry.callcount for entry in profile.getstats())

    folder = folders["two"]  # with norms of its own
    first = [num_calls(lambda i=i: engine.add(f"more{i}", folder)) for i in range(40)]
    replaced = num_calls(lambda: engine.replace("more39", folder))
    removed = [num_calls(lambda i=i: engine.remove(f"more{i}")) for i in range(40)]
    assert max(first[-1], replaced) < 1.02 * first[1]  # constant but for a caches' few calls
    assert removed[0] < 1.02 * removed[-1]


def test_the_backbone_is_there_once(engine: MultiTaskEngine) -> None:
    words = {m.model.get_input_embeddings().weight.data_ptr() for m in engine._views.values()}
    assert len(engine._views) >= 4
    assert len(words) == 1


def test_calls_in_many_threads_while_tasks_change(
    changing_engine: MultiTaskEngine, backbone: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A row is answered by the old version or by the new one, never by a mixture, and other tasks notice nothing."""
    engine = changing_engine
    versions = [folders["two"], save_task(backbone, tmp_path / "newer", METHODS["spartan"](num_labels=2), seed=7)]
    allowed = [alone(backbone, folder, TEXTS[0]) for folder in versions]
    steady = {name: values(engine.predict([(name, TEXTS[1])])[0]) for name in TASKS if name != "two"}
    stop, seen = threading.Event(), set()

    def ask(seed: int) -> int:
        order = np.random.default_rng(seed).permutation(list(steady)).tolist()
        calls = 0
        while not stop.is_set():
            answers = engine.predict([("two", TEXTS[0]), *((name, TEXTS[1]) for name in order)])
            answers_of_all = engine.predict_all([TEXTS[1]], ["upper", "degree"])[0]
            matching = [np.allclose(values(answers[0]), version, rtol=1e-4, atol=1e-5) for version in allowed]
            assert any(matching)
            seen.add(matching.index(True))
            for name, answer in zip(order, answers[1:], strict=True):
                np.testing.assert_allclose(values(answer), steady[name], rtol=1e-4, atol=1e-5)
            for name, answer in answers_of_all.items():
                np.testing.assert_allclose(values(answer), steady[name], rtol=1e-4, atol=1e-5)
            calls += 1
        return calls

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, seed) for seed in range(4)]
        try:
            for step in range(12):
                engine.replace("two", versions[(step + 1) % 2])
                engine.add("extra", folders["five"])
                engine.remove("extra")
        finally:
            stop.set()
        assert all(one.result() > 0 for one in running)
    assert seen == {0, 1}


# -- bad tasks -----------------------------------------------------------------------------------------------------


Make = Callable[[Path, dict[str, Path], Path], Path]  # of a task's folder, from the backbone, the tasks and a place


def _saved(config: PeftConfig) -> Make:
    return lambda backbone, folders, target: save_task(backbone, target, config)


def _damaged(file: str, change: Callable[[Path], Any]) -> Make:
    """A copy of a task with a changed file."""

    def make(backbone: Path, folders: dict[str, Path], target: Path) -> Path:
        shutil.copytree(folders["two"], target)
        change(target / file)
        return target

    return make


def _foreign(backbone: Path, folders: dict[str, Path], target: Path) -> Path:
    return save_task(save_tiny_backbone(target.parent / "other", seed=3), target, METHODS["spartan"](num_labels=2))


def _not_finite(weights: Path) -> None:
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)


def _of_four_labels(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {str(i): f"LABEL_{i}" for i in range(4)}
    path.write_text(json.dumps(config | {"num_labels": 4, "id2label": names}), encoding="utf-8")


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_foreign, "backbone"),
        (_damaged(WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:1000])), "could not be loaded"),
        (_damaged(CONFIG, lambda path: path.write_text('{"peft_type": ', encoding="utf-8")), "damaged"),
        (_damaged(WEIGHTS, _not_finite), "not finite"),
        (_damaged(CONFIG, _of_four_labels), "of another shape"),
        (_saved(LORA), "the method lora, .* can; use this one, which says nothing of its labels, through PeftModel"),
        (_saved(METHODS["spartan"](num_labels=3, problem_type="regression")), "predicts 3 values at once"),
        (_saved(METHODS["spartan"](task_type="FEATURE_EXTRACTION")), r"FEATURE_EXTRACTION, .*SEQ_CLS, TOKEN_CLS"),
        (lambda backbone, folders, target: target, "There is no folder"),
        (lambda backbone, folders, target: target.parent, "adapter_config.json is missing"),
    ],
)
def test_a_bad_task_is_refused_and_the_engine_goes_on(
    engine: MultiTaskEngine, backbone: Path, folders: dict[str, Path], tmp_path: Path, make: Make, message: str
) -> None:
    before = engine.predict([(name, TEXTS[0]) for name in TASKS])
    loaded = [sorted(model._sites) for model in engine._views.values()]
    folder = make(backbone, folders, tmp_path / "bad")
    with pytest.raises(UserError, match=message):
        engine.add("bad", folder)
    with pytest.raises(UserError, match=message):
        engine.replace("two", folder)
    assert list(engine.tasks) == list(TASKS)
    assert engine.predict([(name, TEXTS[0]) for name in TASKS]) == before
    assert [sorted(model._sites) for model in engine._views.values()] == loaded


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    *(({"token_budget": value}, "whole number of at least 1") for value in (0, "4", None, 1.5, float("nan"), True)),
    ({"tasks": ["out/a"]}, "`tasks` is ['out/a'] (list)"),
    ({"tasks": {"a": None}}, "folder is None (NoneType); expected a path"),
    *(({"tasks": {name: "out/a"}}, "a task's name is a text") for name in (3, "", ("a", "b"))),
    ({"tokenizer": "bert"}, "`tokenizer` is 'bert' (str); expected a loaded tokenizer"),
    *(({"dtype": value}, "torch.float16 or torch.float64, or fp32") for value in ("int8", float, torch.int8, [])),
    ({"onednn": "yes"}, "`onednn='yes'` was given, but it must be True or False"),
]


@pytest.mark.parametrize(("given", "message"), BAD_ARGUMENTS, ids=[str(given) for given, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_refused(backbone: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        MultiTaskEngine(backbone, **given)


def test_a_bad_backbone_is_refused_and_a_dtype_has_a_name(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(UserError, match="neither an existing folder"):
        MultiTaskEngine(tmp_path / "nothing" / "here")
    assert "bfloat16" in repr(MultiTaskEngine(backbone, dtype="bf16"))
    for kind in (AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification):
        with pytest.raises(UserError, match=r"`backbone` is a Bert.*, which does not classify texts"):
            MultiTaskEngine(kind.from_pretrained(backbone))
    adapted = get_peft_model(AutoModelForSequenceClassification.from_pretrained(backbone), LORA)
    for given, words in ((adapted, "is a PeftModel.*pass its base model"), (3, "is a int; expected a hub id")):
        with pytest.raises(UserError, match=words):
            MultiTaskEngine(given)  # type: ignore[arg-type]


def test_a_model_that_returns_tuples_and_a_tokenizer_that_adds_nothing(
    backbone: Path, folders: dict[str, Path]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(backbone, return_dict=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    engine = MultiTaskEngine(model, {"two": folders["two"]}, tokenizer=tokenizer)
    assert engine.logits("two", TEXTS[:2]).shape == (2, 2)
    assert model.config.return_dict is False  # as it was
    with pytest.raises(UserError, match="no character that the tokenizer knows"):
        engine.logits("two", [TEXTS[0], ""])


def test_what_is_called_wrongly_is_said_at_once(engine: MultiTaskEngine) -> None:
    with pytest.raises(UserError, match="token_budget=0"):
        engine.token_budget = 0
    for change in (
        lambda: engine.add("n", None),  # type: ignore[arg-type]
        lambda: engine.add(3, "out/a"),  # type: ignore[arg-type]
        lambda: engine.remove(None),  # type: ignore[arg-type]
        lambda: engine.predict_all(["x"], [1]),  # type: ignore[list-item]
    ):
        with pytest.raises(UserError, match=r"folder is None|name is a text"):
            change()
    for one in ("two", ("two", TEXTS[0]), {"text": TEXTS[0]}):
        with pytest.raises(UserError, match=r"One request, .* pass a list of them"):
            engine.predict(one)  # type: ignore[arg-type]
    for ask in (engine.predict, engine.predict_all):
        with pytest.raises(UserError, match="`truncation='no'` was given"):
            ask([], truncation="no")
        with pytest.raises(UserError, match="`on_error='rise'` was given; pass 'return' or 'raise'"):
            ask([], on_error="rise")  # type: ignore[operator]
    assert repr(engine).endswith("float32 on cpu, 9 tasks: two, five, product, degree, upper and 4 more)")
    assert "labels: " in repr(engine.tasks["two"])
