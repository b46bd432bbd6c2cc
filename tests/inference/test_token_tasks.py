"""Tasks that label tokens: each row as transformers' pipeline answers it from PEFT's own model, beside other tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import PeftModel
from tests.inference.conftest import NAMES, TASKS, TOKEN_TASKS, save_task
from tests.inference.test_engine import TEXTS, alone, values
from tests.tiny import save_tiny_backbone
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from sparsepeft import MultiTaskEngine, SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.inference import Prediction
from sparsepeft.inspection import read_text

EVERYTHING: dict[str, Any] = {"aggregation_strategy": "none", "ignore_labels": []}
# WordPiece tells words by its tokens; for the others the pipeline guesses, with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Tokenizer does not support real words:UserWarning")


def save_pieces(folder: Path) -> Path:
    """A backbone with a WordPiece tokenizer that cuts most words in pieces and leaves capitals out."""
    backbone = save_tiny_backbone(folder)
    letters = "abcdefghijklmnopqrstuvwxyz.,-"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "the", "##ing"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    return backbone


def pipeline_of(backbone: Path, folder: Path, **options: Any) -> Any:
    """transformers' own, on the task's own model."""
    model = PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(backbone), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    return pipeline("token-classification", model=model.get_base_model(), tokenizer=tokenizer, device="cpu", **options)


def check(prediction: Prediction, expected: Iterable[dict[str, Any]], text: str) -> None:
    assert prediction.error is None
    found, wanted = prediction.entities or (), list(expected)
    assert [(one.label, one.start, one.end) for one in found] == [
        (one.get("entity_group", one.get("entity")), one["start"], one["end"]) for one in wanted
    ]
    assert [one.score for one in found] == pytest.approx([float(one["score"]) for one in wanted], rel=1e-3, abs=1e-5)
    assert all(one.word == text[one.start : one.end] for one in found)


@pytest.fixture(scope="module")
def both(backbone: Path, folders: dict[str, Path], token_folders: dict[str, Path]) -> MultiTaskEngine:
    return MultiTaskEngine(backbone, folders | token_folders, token_budget=256)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, MultiTaskEngine]:
    """A backbone whose words have several tokens, a task on it, and an engine with that."""
    backbone = save_pieces(tmp_path_factory.mktemp("pieces"))
    folder = save_task(backbone, tmp_path_factory.mktemp("tasks") / "names", TOKEN_TASKS["names"])
    return backbone, folder, MultiTaskEngine(backbone, {"names": folder}, token_budget=256)


def test_each_row_equals_its_task_alone(
    both: MultiTaskEngine, engine: MultiTaskEngine, backbone: Path, token_folders: dict[str, Path]
) -> None:
    requests = [(name, text) for text in TEXTS[:5] for name in (*TASKS, *TOKEN_TASKS)]
    answers = dict(zip(requests, both.predict(requests, **EVERYTHING), strict=True))
    of_texts = [(name, text) for text in TEXTS[:5] for name in TASKS]
    for request, other in zip(of_texts, engine.predict(of_texts), strict=True):
        assert values(answers[request]) == pytest.approx(values(other), rel=1e-4, abs=1e-5)
        assert answers[request].entities is None
    all_at_once = both.predict_all(TEXTS[:5], **EVERYTHING)
    for name, folder in token_folders.items():
        alone_is = pipeline_of(backbone, folder, **EVERYTHING)
        for text, of_all in zip(TEXTS[:5], all_at_once, strict=True):
            check(answers[name, text], alone_is(text), text)
            check(of_all[name], alone_is(text), text)
    assert both.tasks["names"].label_names == tuple(NAMES.values())
    assert [both.tasks[name].problem_type for name in ("names", "houlsby names", "degree", "five")] == [
        *("token_classification", "token_classification", "regression", "single_label_classification")
    ]


def test_texts_and_tokens_share_a_pass(both: MultiTaskEngine) -> None:
    rows: list[int] = []
    hook = both._views["SPARTAN"].model.bert.embeddings.register_forward_hook(lambda m, a, o: rows.append(len(o)))
    both.predict([("names", "one two"), ("two", "three four"), ("linear", "five six"), ("five", "seven eight")])
    both.predict_all(["one two"], ["upper", "upper names", "degree"])
    hook.remove()
    assert rows == [4, 1, 3]  # below the tasks' lowest layer once, and above it for each


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_tokens_are_put_together_as_the_pipeline_does(
    pieces: tuple[Path, Path, MultiTaskEngine], strategy: str
) -> None:
    backbone, folder, engine = pieces
    options: dict[str, Any] = {"aggregation_strategy": strategy}
    texts = ["The  striker, Zoë-Ann, scored twice.", "Berlin\nor Rome?", "[SEP] ?", *TEXTS[:3]]
    for ignored in ({}, {"ignore_labels": ["O", "PER", "I-PER"]}):
        expected = pipeline_of(backbone, folder, **options, **ignored)
        answers = engine.predict([("names", text) for text in texts], **options, **ignored)
        for text, answer in zip(texts, answers, strict=True):
            check(answer, expected(text), text)


def test_a_long_text_is_cut_or_read_in_parts(pieces: tuple[Path, Path, MultiTaskEngine]) -> None:
    backbone, folder, engine = pieces
    long = " ".join(TEXTS[:8])
    (cut,) = engine.predict([("names", long)])
    assert cut.truncated
    assert cut.num_tokens == 64
    check(cut, pipeline_of(backbone, folder, aggregation_strategy="simple")(long), long)
    for stride in (0, 20):
        whole, short = engine.predict([("names", long), ("names", "Rome")], stride=stride)
        check(whole, pipeline_of(backbone, folder, aggregation_strategy="simple", stride=stride)(long), long)
        assert not whole.truncated
        # In a batch its scores may round otherwise; all else is what it is alone.
        found, by_itself = (list(one.entities or ()) for one in (short, engine.predict([("names", "Rome")])[0]))
        assert [replace(one, score=0.0) for one in found] == [replace(one, score=0.0) for one in by_itself]
        assert [one.score for one in found] == pytest.approx([one.score for one in by_itself], rel=1e-6)
    (tokens,) = engine.predict([("names", long)], aggregation_strategy="none", ignore_labels=(), stride=20)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    places = tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [(one.start, one.end) for one in tokens.entities or ()] == places
    tokenizer.truncation_side = "left"
    left = MultiTaskEngine(backbone, {"names": folder}, tokenizer=tokenizer)
    assert left.predict([("names", long)], stride=20)[0].entities == whole.entities
    (refused, too_long) = (
        engine.predict([("names", long)], **given)[0] for given in ({"stride": 62}, {"truncation": False})
    )
    assert "at most 62 tokens beside the special ones" in str(refused.error)
    assert "longer than the 64 tokens" in str(too_long.error)


_SIZES = {"eos_token_id": 3, "bos_token_id": 2}  # [SEP] ends an input
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES: dict[str, Any] = {
    "roberta": lambda **c: hf.RobertaModel(hf.RobertaConfig(**c)),
    "distilbert": lambda **c: hf.DistilBertModel(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **c)
    ),
    "albert": lambda **c: hf.AlbertModel(hf.AlbertConfig(**c, embedding_size=16)),
    "electra": lambda **c: hf.ElectraModel(hf.ElectraConfig(**c, embedding_size=16)),
    "deberta-v2": lambda **c: hf.DebertaV2Model(hf.DebertaV2Config(**c)),
    "mpnet": lambda **c: hf.MPNetModel(hf.MPNetConfig(**c)),
    "modernbert": lambda **c: hf.ModernBertModel(hf.ModernBertConfig(**c, cls_token_id=2, sep_token_id=3)),
    "gpt2": lambda **c: hf.GPT2Model(hf.GPT2Config(**c, n_positions=64)),
    "llama": lambda **c: hf.LlamaModel(hf.LlamaConfig(**c)),
    "t5": lambda **c: hf.T5Model(hf.T5Config(**c, d_model=32, num_layers=2, d_kv=8, d_ff=64, decoder_start_token_id=0)),
    "xlnet": lambda max_position_embeddings, **c: hf.XLNetModel(
        hf.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, **c)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    side = "left" if architecture in ("llama", "xlnet") else "right"
    build = ARCHITECTURES[architecture]
    backbone = save_tiny_backbone(tmp_path / "backbone", build=build, padding_side=side, max_positions=66, **_SIZES)
    made = {
        "names": TOKEN_TASKS["names"],  # with all norms, as the next one
        "two": TASKS["two"],
        "linear": TOKEN_TASKS["linear"],
        "five": TASKS["five"],
    }
    folders = {name: save_task(backbone, tmp_path / name, config) for name, config in made.items()}
    pipelines = {name: pipeline_of(backbone, folders[name], **EVERYTHING) for name in ("names", "linear")}
    for names in (list(made), ["two", "names"]):
        engine = MultiTaskEngine(backbone, {name: folders[name] for name in names})
        answers = engine.predict([(name, text) for text in TEXTS[:3] for name in names], on_error="raise", **EVERYTHING)
        for place, text in enumerate(TEXTS[:3]):
            for name, answer in zip(names, answers[place * len(names) :], strict=False):
                if name in TOKEN_TASKS:
                    check(answer, pipelines[name](text), text)
                else:
                    assert values(answer) == pytest.approx(alone(backbone, folders[name], text), rel=1e-3, abs=1e-4)


def test_what_cannot_be_answered(both: MultiTaskEngine, token_folders: dict[str, Path]) -> None:
    pair, ids = ("one", "two"), {"input_ids": [2, 5, 3]}
    inputs: list[Any] = [pair, ids, " ", "fine"]
    errors = [one.error for one in both.predict([("names", text) for text in inputs])]
    for error, words in zip(errors, ("takes 1 text(s)", "pass the text", "empty text", "None"), strict=True):
        assert words in str(error)
    assert "names" not in both.predict_all([pair])[0]
    assert both.predict([("names", "fine")], ignore_labels=["O", "PER", "LOC"])[0].to_dict() == {"entities": []}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"aggregation_strategy": "best"}, "`aggregation_strategy='best'` was given; pass none, simple"),
        ({"ignore_labels": "O"}, "`ignore_labels='O'` was given; pass a list"),
        ({"stride": -1}, "`stride=-1` was given; pass a whole number"),
    ]
    for given, words in bad:
        with pytest.raises(UserError, match=re.escape(words)):
            both.predict([("names", "fine")], **given)
    with pytest.raises(UserError, match="'names' were asked for, but it labels tokens"):
        both.logits("names", ["fine"])
    with pytest.raises(UserError, match="'two' were asked for, but it labels texts"):
        both.token_logits("two", [ids])
    assert len(read_text(both, "names", "one two").tokens) == 4


def test_what_cannot_be_loaded(backbone: Path, token_folders: dict[str, Path], tmp_path: Path) -> None:
    slow = hf.CanineTokenizer(model_max_length=64)
    with pytest.raises(UserError, match="CanineTokenizer, cannot tell where in a text"):
        MultiTaskEngine(backbone, {"names": token_folders["names"]}, tokenizer=slow)
    bart = lambda **c: hf.BartModel(  # noqa: E731
        hf.BartConfig(
            **c, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=3,
        )
    )  # fmt: skip
    other = save_tiny_backbone(tmp_path / "bart", build=bart, **_SIZES)
    with pytest.raises(UserError, match="transformers has no token classification for bart"):
        MultiTaskEngine(other, {"names": token_folders["names"]})


def test_a_task_comes_and_goes_on_a_loaded_model(backbone: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    model = hf.AutoModelForSequenceClassification.from_pretrained(backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = MultiTaskEngine(model, {"two": folders["two"]}, dtype="bf16")
    config = SpartanConfig(id2label=NAMES, task_type="TOKEN_CLS", save_dtype="int8")
    folder = save_task(backbone, tmp_path / "names", config)
    engine.add("names", folder)
    check(
        *engine.predict([("names", TEXTS[0])]),
        pipeline_of(backbone, folder, aggregation_strategy="simple")(TEXTS[0]),
        TEXTS[0],
    )
    text_only = MultiTaskEngine(model, {"two": folders["two"]}).predict([("two", TEXTS[0])])
    assert values(engine.predict([("two", TEXTS[0])])[0]) == pytest.approx(values(text_only[0]))
    engine.remove("names")
    engine.add("names", folders["five"])  # a name may come back as another kind
    assert engine.predict([("names", TEXTS[0])])[0].scores
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
