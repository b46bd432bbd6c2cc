"""Fine-tuning language models: text to blocks, what a run leaves, how it resumes, perplexity."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tests.tiny import Interrupt, save_tiny_backbone, topics_rows, topics_text, write_jsonl
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM

from sparsepeft.errors import UserError
from sparsepeft.folders import UNFINISHED
from sparsepeft.methods.language_models import perplexity
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.planning import Plan, search
from sparsepeft.runs.corpus import (
    begin_token,
    cut,
    evenly_spaced,
    join,
    load_corpus,
    num_predicted,
    read_documents,
    without,
)
from sparsepeft.runs.files import CHECKPOINTS, RESULTS, RUN
from sparsepeft.spt import load_sparse, sparsification
from sparsepeft.training import Predictor, RunConfig, evaluate, sparsify_language_model, train
from sparsepeft.training.checkpoints import last_checkpoint

SPT = {"top_l": 0.25, "values": "routed", "num_blocks": 4, "num_active_blocks": 2, "codebook_interval": 3}


def lm_config(language_model: Path, folder: Path, **changes: Any) -> RunConfig:
    """A short run on the built-in sample's text, written beside the folder."""
    values: dict[str, Any] = {"text": str(topics_text(folder.parent)), "model": str(language_model)}
    short = {"block_length": 32, "max_steps": 12, "batch_size": 8, "learning_rate": 1e-2}
    return RunConfig("lm", str(folder), **(values | short | changes))


def _texts(*files: Path) -> RunConfig:
    """A config that names a file, and maybe one with validation text."""
    return RunConfig("lm", "o", model="m", text=tuple(map(str, files[:1])), validation_text=tuple(map(str, files[1:])))


def test_documents_of_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One line.\n\nAnother.\n")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "first", "n": 1}, {"text": "  "}, {"text": "second"}])
    (tmp_path / "c.csv").write_text('text,label\n"a, b",x\n')
    files = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv")]
    assert read_documents(files) == ["One line.\n\nAnother.\n", "first", "second", "a, b"]
    assert read_documents(files[2:], "label") == ["x"]
    half = write_jsonl(tmp_path / "d.jsonl", [{"text": "\ud83d"}])
    with pytest.raises(UserError, match=r"d\.jsonl:1: 'text' has half of a surrogate pair"):
        read_documents([str(half)])


def test_blocks_hold_all_documents_in_order(tiny_language_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_language_model))
    documents = [row["text"].lower() for row in topics_rows("train")[:40]]
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in documents])
    other = write_jsonl(tmp_path / "v.jsonl", [{"text": text} for text in documents[:9]])
    tokens = join(documents, tokenizer)
    assert int((tokens == tokenizer.sep_token_id).sum()) == 40
    assert tokenizer.cls_token_id not in tokens
    for begin, length in ((None, 16), (2, 15)):  # without and with [CLS] at the head of each block of 16
        corpus = load_corpus(_texts(file, other), tokenizer, 16, begin)
        assert corpus.train.shape == (len(tokens) // length, 16)
        text = corpus.train[:, -length:].flatten()
        assert torch.equal(text, tokens[: len(text)])
        assert begin is None or corpus.train[:, 0].eq(2).all()
        assert corpus.notes == ()
        assert num_predicted(corpus.train) == corpus.train[:, 1:].numel()


def test_the_token_that_begins_a_text_is_the_tokenizers(tiny_language_model: Path) -> None:
    tiny = load_tokenizer(str(tiny_language_model))
    vocabulary = {"<|end|>": 0, "a": 1, "<s>": 2}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))

    def tokenizer(template: str | None = None, **names: str) -> hf.PreTrainedTokenizerFast:
        bare.post_processor = template and processors.TemplateProcessing(
            template, special_tokens=list(vocabulary.items())
        )
        return hf.PreTrainedTokenizerFast(tokenizer_object=bare, **names)

    found = {
        "[CLS] of a BERT tokenizer": begin_token(tiny),
        "Llama, Gemma": begin_token(tokenizer("<s> $A", bos_token="<s>", eos_token="<|end|>")),
        "OPT, which begins and ends a text alike": begin_token(tokenizer("<s> $A", bos_token="<s>", eos_token="<s>")),
        "GPT-2, which puts nothing before": begin_token(tokenizer(bos_token="<|end|>", eos_token="<|end|>")),
        "Qwen, which has none": begin_token(tokenizer(eos_token="<|end|>")),
        "T5, which ends a text alone": begin_token(tokenizer("$A <s>", bos_token="<s>", eos_token="<s>")),
    }
    assert list(found.values()) == [2, 2, 2, None, None, None]
    assert begin_token(tokenizer(bos_token="<|end|>"), True) == 0
    assert begin_token(tiny, False) is None
    with pytest.raises(UserError, match=r"`bos_token=True` was given, but .* no begin-of-text token"):
        begin_token(tokenizer(eos_token="<|end|>"), True)


@pytest.mark.parametrize("num_documents", [1, 40])
def test_held_out_text_is_not_trained_on(tiny_language_model: Path, tmp_path: Path, num_documents: int) -> None:
    tokenizer = load_tokenizer(str(tiny_language_model))
    rows = topics_rows("train")
    if num_documents == 1:
        file = topics_text(tmp_path)
    else:
        file = write_jsonl(tmp_path / "t.jsonl", [{"text": row["text"].lower()} for row in rows[:num_documents]])
    corpus = load_corpus(_texts(file), tokenizer, 8)
    assert len(corpus.notes) == 1
    share = corpus.validation.numel() / (corpus.validation.numel() + corpus.train.numel())
    assert 0.05 < share < 0.15
    texts = [" ".join(map(str, part.flatten().tolist())) for part in (corpus.train, corpus.validation)]
    end = f" {tokenizer.sep_token_id} "
    whole = join(read_documents([str(file)]), tokenizer)
    documents = " ".join(map(str, whole.tolist())).split(end)
    for document in documents:  # each is in one of the two parts only
        assert sum(document in text for text in texts) <= 1
    assert torch.equal(load_corpus(_texts(file), tokenizer, 8).validation, corpus.validation)
    blocks = torch.arange(10).view(10, 1)
    assert evenly_spaced(blocks, 3).flatten().tolist() == [0, 4, 9]
    assert evenly_spaced(blocks, 20).equal(blocks)


def test_perplexity_is_that_of_all_predicted_tokens(tiny_language_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).train()
    blocks = torch.randint(5, 60, (7, 12))
    with torch.no_grad():
        log_probabilities = model.eval()(input_ids=blocks).logits.log_softmax(-1)
    found = log_probabilities[:, :-1].gather(2, blocks[:, 1:, None])
    model.train()
    # Batches of 3, 3 and 1: the last counts for less.
    result = perplexity(model, blocks, batch_size=3)
    assert result["loss"] == pytest.approx(-float(found.mean()), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert model.training


BAD_CONFIGS = {
    "method": ({"method": "lroa"}, ["did you mean 'lora'"]),
    "a head": ({"method": "head"}, ["head", "lora"]),
    "spt setting": ({"spt": {"num_active_block": 3}}, ["num_active_block", "did you mean 'num_active_blocks'"]),
    "spt value": ({"spt": {"num_active_blocks": 9, "num_blocks": 8}}, ["num_active_blocks=9", "num_blocks=8"]),
    "spt number": ({"spt": {"top_l": "many"}}, ["top_l='many'", "number", "0.125"]),
    "spt budget": ({"spt": {"budget": "2 percent"}}, ["budget='2 percent'", "such as 2% or 0.02"]),
    "spt truth": ({"spt": {"attention": 0}}, ["attention=0", "true or false"]),
    "spt layers": ({"spt": {"layers_to_transform": "3"}}, ["SPT settings", "layers_to_transform='3'", "positions"]),
    "no spt layers": ({"spt": {"layers_to_transform": []}}, ["SPT settings", "layers_to_transform is empty"]),
    "spt as a word": ({"spt": True}, ["mapping"]),
    "full and sparse": ({"method": "full", "spt": {}}, ["full", "lora"]),
    "block of one": ({"block_length": 1}, ["block_length=1", "2"]),
    "half a block": ({"block_length": 20.5}, ["`block_length=20.5`", "whole number"]),
    "a token itself": ({"bos_token": "<s>"}, ["`bos_token=<s>`", "true or false"]),
    "no steps": ({"max_steps": 0}, ["max_steps=0", "at least 1"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    changes, words = BAD_CONFIGS[case]
    with pytest.raises(UserError) as caught:
        RunConfig(**({"task": "lm", "text": "t.txt", "output_dir": "o", "model": "m"} | changes))
    assert all(word in str(caught.value) for word in words)


BAD_RUNS = {
    "missing file": ({"text": "{tmp}/none.txt"}, ["none.txt", "does not exist"]),
    "empty text": ({"text": "{tmp}/empty.txt"}, ["empty.txt", "no text"]),
    "no such column": ({"text": "{tmp}/rows.jsonl", "text_column": "body"}, ["'body'", "'text'"]),
    "no text in a row": ({"text": "{tmp}/numbers.jsonl"}, ["numbers.jsonl:1", "7"]),
    "short text": ({"text": "{tmp}/short.txt"}, ["training text", "less than one block of 32"]),
    "short validation": ({"validation_text": "{tmp}/short.txt"}, ["validation text", "less than one block of 32"]),
    "long block": ({"block_length": 65}, ["block_length=65", "at most 64"]),
    "masked model": ({"model": "{bert}"}, ["bert", "causal language model"]),
    "no such model": ({"model": "{tmp}"}, ["config.json"]),
    "setting of the method": ({"settings": {"rr": 3}}, ["'rr'", "lora_alpha"]),
    "sub-vectors": ({"spt": {"subvector_dim": 3}}, ["8 channels", "subvector_dim=3"]),
    "blocks of neurons": ({"spt": {"num_blocks": 7, "num_active_blocks": 2}}, ["64 neurons", "num_blocks=7"]),
    "an adapter inside a routed FFN": ({"method": "ia3", "spt": SPT}, ["`method=ia3`", "no plain LoRA"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_leave_nothing(case: str, tiny_language_model: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the team won\n")
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "numbers.jsonl", [{"text": 7}])
    changes, words = BAD_RUNS[case]
    values = {
        key: value.format(tmp=tmp_path, bert=tiny_backbone) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError) as caught:
        train(lm_config(tiny_language_model, tmp_path / "out", **values))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_without_a_known_ffn(tmp_path: Path) -> None:
    def mamba(**values: Any) -> hf.PreTrainedModel:
        return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=values["vocab_size"], hidden_size=16, num_hidden_layers=1))

    model = save_tiny_backbone(tmp_path / "mamba", build=mamba)
    with pytest.raises(UserError, match="no FFN of a known form"):
        train(lm_config(model, tmp_path / "out", spt={"attention": False}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "spt"),
    [("lora", None), ("houlsby", None), ("ia3", None), ("full", None), ("lora", SPT), ("spartan", SPT)],
)
def test_a_run_leaves_weights_and_results_that_evaluate_agrees_with(
    method: str, spt: dict | None, tiny_language_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    results = train(lm_config(tiny_language_model, out, method=method, spt=spt))
    assert json.loads((out / RESULTS).read_text()) == results
    assert results["score"] == results["metrics"]["validation"]["perplexity"]
    assert results["score"] < min(values["perplexity"] for values in results["before"].values())
    assert list(results["before"]) == ["dense"] + ["sparse"] * (spt is not None)
    assert not (out / UNFINISHED).exists()
    # The same weights and arithmetic: the order of a sum may differ, not more.
    scores = evaluate(out)
    assert scores["validation"]["perplexity"] == pytest.approx(results["score"], rel=1e-5)
    assert (
        list(scores.metrics_by_infer)
        == list(results.get("metrics_by_infer", []))
        == ((spt and ["sparse", "dense"]) or [])
    )
    for infer, metrics in scores.metrics_by_infer.items():
        expected = results["metrics_by_infer"][infer]["validation"]["perplexity"]
        assert metrics["validation"]["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert evaluate(out, infer=infer)["validation"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    if spt is None:
        with pytest.raises(UserError, match="of a dense model"):
            evaluate(out, infer="dense")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert results["saved_bytes"] == size
    if method != "full":
        assert size < (tiny_language_model / "model.safetensors").stat().st_size
    assert (results["parameters"]["routers"] > 0) == (spt is not None)
    if spt is not None:
        assert results["spt"]["config"]["top_l"] == 8
        assert results["spt"]["report"]["feed_forward_operations"] == pytest.approx(0.5 + 32 * 4 / (3 * 32 * 64))
        assert results["before"]["dense"] != results["before"]["sparse"]
        assert len({metrics["validation"]["loss"] for metrics in scores.metrics_by_infer.values()}) == 2
    with pytest.raises(UserError, match="no labels"):
        Predictor(out)
    with pytest.raises(UserError, match="finished run"):
        train(lm_config(tiny_language_model, out, method=method, spt=spt))


@pytest.mark.slow
def test_a_run_of_before_is_scored_as_it_was(tiny_language_model: Path, tmp_path: Path) -> None:
    with_token, without = (
        train(lm_config(tiny_language_model, tmp_path / name, bos_token=value, max_steps=2))
        for name, value in (("new", None), ("old", False))
    )
    assert (with_token["bos_token"], without["bos_token"]) == ("[CLS]", None)
    assert with_token["num_train_tokens"] % 31 == without["num_train_tokens"] % 31 == 0
    run = json.loads((tmp_path / "old" / RUN).read_text())
    assert run.pop("bos_token_id") is None  # an earlier version wrote neither
    assert run["config"].pop("bos_token") is False
    (tmp_path / "old" / RUN).write_text(json.dumps(run))
    for name, results in (("new", with_token), ("old", without)):
        assert evaluate(tmp_path / name)["validation"]["perplexity"] == pytest.approx(results["score"], rel=1e-5)


@pytest.mark.slow
def test_parameters_are_the_closed_formula(tiny_language_model: Path, tmp_path: Path) -> None:
    results = train(lm_config(tiny_language_model, tmp_path / "o", spt=SPT, max_steps=1))
    lora = 2 * 8 * ((32 + 32) + (32 + 16))  # 2 layers, rank 8: queries 32 to 32, values 32 to 16
    routers = 2 * 4 * (32 + 1)
    assert results["parameters"] == {"trained": lora + routers, "routers": routers}
    vocabulary = json.loads((tiny_language_model / "config.json").read_text())["vocab_size"]
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert results["model_bytes"] == 4 * (2 * 32 * vocabulary + 2 * layer + 32)


@pytest.mark.slow
def test_an_interrupted_sparse_run_ends_as_if_it_had_not_been(tiny_language_model: Path, tmp_path: Path) -> None:
    whole = train(lm_config(tiny_language_model, tmp_path / "whole", spt=SPT))
    config = lm_config(tiny_language_model, tmp_path / "cut", spt=SPT)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Interrupt(7)])  # codebooks are due after step 6: they wait at its checkpoint
    checkpoint = last_checkpoint(tmp_path / "cut" / UNFINISHED / CHECKPOINTS)
    assert checkpoint is not None
    with pytest.raises(UserError, match="unfinished run with other values of seed"):
        train(lm_config(tiny_language_model, tmp_path / "cut", spt=SPT, seed=1))
    text = Path(config.text[0]).read_text()
    Path(config.text[0]).write_text(text + "more")
    with pytest.raises(UserError, match=r"other values of topics.txt \(its content\)"):
        train(config)
    Path(config.text[0]).write_text(text)
    resumed = train(config)
    assert resumed["metrics"]["validation"]["loss"] == pytest.approx(whole["metrics"]["validation"]["loss"], rel=1e-5)
    for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "cut" / "adapter_model.safetensors")[name], tensor)


@pytest.mark.slow
def test_accumulation_and_checkpointing_change_nothing(tiny_language_model: Path, tmp_path: Path) -> None:
    changes = [
        {"batch_size": 8},
        {"batch_size": 8, "gradient_checkpointing": True},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
    ]
    # Plain LoRA: the balance of a routed FFN is that of a batch, which accumulation makes smaller.
    runs = [lm_config(tiny_language_model, tmp_path / str(i), max_steps=4, **each) for i, each in enumerate(changes)]
    losses = [train(run)["metrics"]["validation"]["loss"] for run in runs]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)


@pytest.mark.slow
def test_bf16_sparse_with_checkpointing(tiny_language_model: Path, tmp_path: Path) -> None:
    options = {"precision": "bf16", "gradient_checkpointing": True, "max_steps": 8}
    results = train(lm_config(tiny_language_model, tmp_path / "o", spt=SPT, **options))
    assert results["score"] < results["before"]["sparse"]["perplexity"]


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_plan(
    tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times that were measured again would give another."""
    spt = {"budget": "5%", "num_blocks": 4, "num_active_blocks": 2}
    config = lm_config(tiny_language_model, tmp_path / "o", spt=spt)
    with monkeypatch.context() as patch:
        patch.setattr(search, "_alternately", lambda forms, inputs: [[10.0 - i] for i in range(len(forms))])
        with pytest.raises(KeyboardInterrupt):
            train(config, callbacks=[Interrupt(7)])
    plan = json.loads((tmp_path / "o" / UNFINISHED / RUN).read_text())["spt_plan"]
    monkeypatch.setattr(search, "_alternately", None)
    results = train(config)
    assert results["spt"]["plan"] == plan
    assert results["spt"]["config"]["overrides"] == {name: each["settings"] for name, each in plan["modules"].items()}
    assert max(Plan.from_dict(plan).measured_change.values()) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_model_within_a_budget(
    is_causal: bool, tiny_language_model: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_alternately", lambda forms, inputs: [[10.0 - i] for i in range(len(forms))])
    text, model = [str(topics_text(tmp_path))], tiny_language_model if is_causal else tiny_backbone
    settings = {"budget": "2%", "num_blocks": 4, "num_active_blocks": 2}
    if not is_causal:
        with pytest.raises(UserError, match="no mask token"):
            sparsify_language_model(str(model), tmp_path / "o", text, settings=settings, block_length=32)
        model = Path(shutil.copytree(model, tmp_path / "masked"))
        tokenizer = load_tokenizer(str(model))
        tokenizer.mask_token = tokenizer.unk_token
        tokenizer.save_pretrained(model)
    results = sparsify_language_model(str(model), tmp_path / "o", text, settings=settings, block_length=32)
    plan = Plan.from_dict(results["plan"])
    assert plan.budget == 0.02
    assert plan.measured_change.keys() == {"calibration", "held_out"}
    assert max(plan.measured_change.values()) <= 0.02
    assert results["config"]["overrides"] == plan.overrides
    assert (results["num_scored_tokens"] > 0) == is_causal
    with pytest.raises(UserError, match="no text to keep to it on; pass `text`"):
        sparsify_language_model(str(model), tmp_path / "p", settings=settings | {"attention": False})


@pytest.mark.slow
def test_conversion_by_itself(tiny_language_model: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    text = [str(topics_text(tmp_path))]
    model, folder = str(tiny_language_model), tmp_path / "o"
    results = sparsify_language_model(model, folder, text, settings=SPT, block_length=32)
    assert json.loads((folder / "spt.json").read_text()) == results
    assert results["config"]["top_l"] == 8
    assert results["calibration"] == [8, 32]
    sparse = load_sparse(AutoModelForCausalLM.from_pretrained(model).eval(), folder)
    assert sparsification(sparse).config.top_l == 8  # type: ignore[union-attr]
    tokenizer = load_tokenizer(model)
    rest = without(cut(join(read_documents(text), tokenizer), 32, "text", tokenizer.cls_token_id), 8)
    assert results["bos_token"] == "[CLS]"
    assert results["num_scored_tokens"] == 31 * len(rest)
    found = perplexity(sparse, rest, 4)["perplexity"]
    assert found == pytest.approx(results["perplexity"]["sparse"], rel=1e-5)
    assert found != pytest.approx(results["perplexity"]["dense"], rel=1e-5)

    with pytest.raises(UserError, match="`overwrite`"):
        sparsify_language_model(model, folder, text, settings=SPT, block_length=32)
    with pytest.raises(UserError, match="pass `text`"):
        sparsify_language_model(model, tmp_path / "p")
    masked = sparsify_language_model(str(tiny_backbone), tmp_path / "p", text, settings=SPT, block_length=32)
    assert masked["perplexity"] == {"dense": None, "sparse": None}
    assert len(masked["report"]["recall"]) == 2
    no_text = sparsify_language_model(model, tmp_path / "q", settings={"attention": False})
    assert no_text["calibration"] is None
    assert no_text["report"]["recall"] == {}


@pytest.mark.slow
def test_a_real_sparse_model_learns_a_real_text(data_dir: Path, tmp_path: Path) -> None:
    model = Path(os.environ["SPARSEPEFT_DATA"]).parent / "models" / "wikitext2-llama"
    if not model.is_dir():
        pytest.skip(f"no language model found in {model.parent}: put the folder wikitext2-llama there")
    from sparsepeft.rows.reading import read_rows

    texts = [row.values["text"] for row in read_rows(data_dir / "bbc-news" / "all.tsv.gz")][:60]
    write_jsonl(tmp_path / "bbc.jsonl", [{"text": text} for text in texts])
    options = {"block_length": 128, "batch_size": 4, "learning_rate": 3e-3, "spt": {"granularity": "token"}}
    results = train(lm_config(model, tmp_path / "o", text=str(tmp_path / "bbc.jsonl"), **options))
    assert results["score"] < 0.8 * results["before"]["sparse"]["perplexity"]  # 0.59 when this was written
    assert 500 < results["before"]["dense"]["perplexity"] < 2000  # 1,026 on other texts of the same set, longer blocks
    assert (tmp_path / "o" / RUN).is_file()
