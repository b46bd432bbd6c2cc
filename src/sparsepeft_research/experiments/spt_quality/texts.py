"""The text that the runs are about: documents to train and calibrate on, and others that are scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsepeft.runs.corpus import begin_token, cut, evenly_spaced, join, read_documents
from sparsepeft.tasks import load_task

BBC, WIKITEXT = "bbc-news", "wikitext-2"
TEXTS = (BBC, WIKITEXT)


def documents(data_dir: Path, name: str) -> tuple[list[str], list[str]]:
    """Documents to learn from, and held-out ones: the task's parts ``train`` and ``test``, WikiText's two small files.

    Articles of BBC News that occur twice are in neither part twice.
    """
    if name == BBC:
        data: Any = load_task(BBC, data_dir=data_dir)
        return data.train["text"][:], data.test["text"][:]
    first, second = (read_documents([str(data_dir / WIKITEXT / f"{part}.txt")]) for part in ("valid", "test"))
    return first, second


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """At most ``count`` blocks of ``length`` tokens from the whole of the texts, begun as the model wants it."""
    return evenly_spaced(cut(join(texts, tokenizer), length, "text", begin_token(tokenizer)), count)


def write_documents(file: Path, texts: Sequence[str]) -> Path:
    """One to a line, as ``sparsepeft train`` reads them."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def leading(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[str]:
    """The first documents that together have so many tokens."""
    chosen, count = [], 0
    for text in texts:
        if count >= num_tokens:
            break
        chosen.append(text)
        count += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
    return chosen
