"""The experiment on what sparsity costs: its runs, and the model with a smaller vocabulary."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny_language_model, topics_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsepeft.methods.sparse import read_spt_settings
from sparsepeft.runs.corpus import begin_token, join, read_documents
from sparsepeft_research.experiments.spt_quality import conversion, finetuning
from sparsepeft_research.experiments.spt_quality.__main__ import KINDS
from sparsepeft_research.experiments.spt_quality.texts import leading
from sparsepeft_research.experiments.spt_quality.vocabulary import cut_vocabulary


@pytest.mark.parametrize("tie", [False, True])
def test_a_smaller_vocabulary_leaves_logits_as_they_were(tie: bool, tmp_path: Path) -> None:
    model = str(save_tiny_language_model(tmp_path / "model", tie_word_embeddings=tie))
    texts = {"train": [row["text"].lower() for row in topics_rows("train")[:6]], "other": ["a fine film"]}
    about = cut_vocabulary(model, texts, tmp_path / "cut")
    whole, cut = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model, tmp_path / "cut"))
    tokenizer, words = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "cut"))
    assert about == {"kept": len(words), "of": whole.config.vocab_size}
    assert len(words) < len(tokenizer)
    assert begin_token(words) == words.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(begin_token(tokenizer)))
    ids, cut_ids = join(texts["train"], tokenizer), join(read_documents([str(tmp_path / "cut/train.jsonl")]), words)
    kept, places = ids.unique(), torch.empty(len(tokenizer), dtype=torch.long)
    places[ids] = cut_ids
    assert torch.equal(places[ids], cut_ids)
    with torch.no_grad():
        expected, actual = whole(ids[None, :60]).logits[..., kept], cut(cut_ids[None, :60]).logits[..., places[kept]]
    torch.testing.assert_close(actual, expected)


def test_every_run_has_a_file_and_settings_that_can_be_used() -> None:
    options = Namespace(model="folder/gemma", lengths=[512, 2048], seeds=[1, 2])
    made = [run for runs in KINDS.values() for run in runs(options)]
    assert len({run.name for run in made}) == len(made) > 50
    assert all({"kind", "setting"} <= run.about.keys() for run in made)
    for spt in (*finetuning.SETTINGS.values(), *conversion.SETTINGS.values()):
        assert spt is None or read_spt_settings(spt)


def test_leading_documents_have_the_tokens_asked_for(tiny_language_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model)
    texts = [row["text"].lower() for row in topics_rows("train")]
    for count in (1, 50, 200):
        chosen = leading(texts, tokenizer, count)
        assert chosen == texts[: len(chosen)]
        assert len(join(chosen, tokenizer)) >= count > len(join(chosen[:-1] or ["a"], tokenizer)) - 2
