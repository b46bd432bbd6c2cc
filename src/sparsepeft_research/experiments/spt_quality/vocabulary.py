"""A language model with only those tokens in its vocabulary that occur in some text.

The head of a small model with a large vocabulary is most of its work, and the same for every way to make its layers
sparse. Without the rows of tokens that the text never has, hidden states are what they were, and a token's logits
too; its probability is higher, since fewer tokens share it, so perplexity is lower than the whole model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsepeft.methods.language_models import load_language_model
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.runs.corpus import begin_token
from sparsepeft_research.experiments.spt_quality.texts import write_documents

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


def cut_vocabulary(model: str, texts: Mapping[str, Sequence[str]], folder: Path) -> dict[str, int]:
    """Write a model with a smaller vocabulary, and the texts as its tokenizer reads them.

    ``folder`` then holds the model, a tokenizer whose words are the ids of the tokens that they were, and a file
    ``NAME.jsonl`` with each of the texts in such words.

    Args:
        model: hub id or folder of a causal language model.
        texts: documents, by name.
        folder: to be made.

    Returns:
        Number of tokens, ``kept`` and ``of`` the model's.
    """
    tokenizer = load_tokenizer(model)
    ids = {
        name: tokenizer(list(each), add_special_tokens=False, verbose=False)["input_ids"]
        for name, each in texts.items()
    }
    special = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    named: dict[Any, str] = {tokenizer.convert_tokens_to_ids(token): token for token in special.values()}
    kept: list[int] = sorted({token for each in ids.values() for document in each for token in document} | named.keys())
    places = {named.get(token, str(token)): place for place, token in enumerate(kept)}

    folder.mkdir(parents=True)
    words = Tokenizer(models.WordLevel(places, unk_token=special.get("unk_token", next(iter(special.values())))))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if (begin := begin_token(tokenizer)) is not None:
        token = named[begin]
        words.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, places[token])]
        )
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    for name, each in ids.items():
        write_documents(folder / f"{name}.jsonl", [" ".join(map(str, document)) for document in each])
    return _cut_model(model, kept, folder)


@torch.no_grad()
def _cut_model(model: str, kept: list[int], folder: Path) -> dict[str, int]:
    loaded: Any = load_language_model(model)[0]
    rows = torch.tensor(kept)
    before = [part.weight[rows] for part in (loaded.get_input_embeddings(), loaded.get_output_embeddings())]
    size = loaded.config.vocab_size
    loaded.resize_token_embeddings(len(kept))
    for part, weight in zip((loaded.get_input_embeddings(), loaded.get_output_embeddings()), before, strict=True):
        part.weight.copy_(weight)
    for config in (loaded.config, loaded.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            setattr(config, name, kept.index(token) if token in kept else None)
    loaded.save_pretrained(folder)
    return {"kept": len(kept), "of": size}
