"""Text for a language model: documents from files, joined and cut into blocks of tokens.

Each block begins with the tokenizer's begin-of-text token (:func:`begin_token`), which the block's length includes.
Models that were trained with it rest their attention on it and are far off without it, in the middle of a text too. It
is nowhere else and is never predicted: of a block of T tokens the other T - 1 are, each from those before it. Without
such a token the first of the text is not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsepeft.errors import UserError
from sparsepeft.rows.decoding import marked_encoding, unpacked_name
from sparsepeft.rows.formats import find_format
from sparsepeft.rows.reading import check_text, distinct_names, read_rows, read_text, sha256
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.held_out import digests_of, still_there

_HELD_OUT = 0.1
_SPLIT_SEED = 42  # the held-out text is the same in every run


@dataclass(frozen=True)
class Corpus:
    """Blocks of tokens.

    Attributes:
        train: (N, T) int64.
        validation: (M, T) int64.
        begin: id of the token that each block begins with; None if all of it is text.
        notes: what a reader of the results should know.
        held_out: digests of the documents that were drawn for validation, if whole ones were, see
            :mod:`sparsepeft.runs.held_out`.
    """

    train: Tensor
    validation: Tensor
    begin: int | None
    notes: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def load_corpus(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    begin: int | None = None,
    *,
    held_out: Sequence[str] | None = None,
) -> Corpus:
    """Read, split and cut the text that a language model's config names.

    Without ``validation_text`` a tenth is held out: whole documents, drawn by a fixed seed, where there are at least
    ten; else the last tenth of each.

    Args:
        block_length: tokens of a block.
        begin: the token that each block begins with, if any.
        held_out: digests of the documents to hold out, of which those that are still there are.

    Raises:
        UserError: a file cannot be read, has no text, or there is less than a block of training or validation text.
    """
    notes: tuple[str, ...] = ()
    drawn: list[str] = []
    column = config.text_column or "text"
    training = read_documents(config.text, column, config.delimiter, config.encoding)
    if config.validation_text:
        validation = read_documents(config.validation_text, column, config.delimiter, config.encoding)
        if set(fingerprints(config.text).values()) & set(fingerprints(config.validation_text).values()):
            notes = ("the validation text is trained on, too: its perplexity says nothing about new text",)
    elif held_out is not None:
        places = still_there(((document,) for document in training), held_out)
        if not places:
            raise UserError(
                f"{', '.join(config.text)} has changed since training, and none of the documents that were held out is "
                "in it any more; measure on other text by `test_file`, or train again."
            )
        validation = [training[place] for place in places]
        notes = (
            f"the text has changed since training; of the {len(held_out):,} documents held out then, {len(places):,} "
            "are still there and were scored",
        )
    else:
        whole = training
        training, validation, note = _hold_out(training)
        notes, drawn = (note,), validation if len(training) < len(whole) else []
    parts = {"training text": training, "validation text": validation}
    train, validating = (cut(join(part, tokenizer), block_length, name, begin) for name, part in parts.items())
    return Corpus(train, validating, begin, notes, tuple(digests_of((document,) for document in drawn)))


def read_documents(
    files: Sequence[str], text_column: str = "text", delimiter: str | None = None, encoding: str | None = None
) -> list[str]:
    """The documents in some files: a .txt file is one, each row of a table (.jsonl, .csv, .tsv, .parquet) is one.

    Args:
        delimiter: of CSV and TSV; None looks for it.
        encoding: None is UTF-8, or what a byte order mark says.

    Raises:
        UserError: a file is missing, damaged, lacks the column, or has no text.
    """
    documents = []
    for name in files:
        path = Path(name)
        is_plain = unpacked_name(path).endswith(".txt")
        texts = [read_text(path, encoding)] if is_plain else _rows(path, text_column, delimiter, encoding)
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise UserError(f"{path} has no text in it; pass a file with text.")
        documents += texts
    return documents


def join(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens of all documents, (N,), an end-of-text token after each.

    Raises:
        UserError: the tokenizer has no such token.
    """
    end = end_token(tokenizer)
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.from_numpy(np.concatenate([[*ids, end] for ids in encoded]).astype(np.int64))


def begin_token(tokenizer: PreTrainedTokenizerBase, required: bool | None = None) -> int | None:
    """Id of the token that each block begins with: the tokenizer's begin-of-text token, or else its [CLS]; or None.

    Args:
        required: None leaves it to the tokenizer. Llama's, Gemma's and OPT's put the token before every text, so the
            model was trained with it; GPT-2's and Qwen's put none, though they may name one.

    Raises:
        UserError: the token is required, and the tokenizer has none.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if required is None:
        required = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    if required and begin is None:
        raise UserError(
            "`bos_token=True` was given, but the model's tokenizer has no begin-of-text token; leave it out."
        )
    return begin if required else None


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends each document: the tokenizer's end-of-text token, or else its [SEP].

    Raises:
        UserError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise UserError(
            "The model's tokenizer has no end-of-text token to put between documents; set its eos_token and save it "
            "with the model."
        )
    return int(end)


def cut(tokens: Tensor, block_length: int, name: str, begin: int | None = None) -> Tensor:
    """Blocks of a text; what is left over at the end fills none.

    Args:
        tokens: (N,).
        block_length: T, with the token ``begin``.
        begin: the token to begin each block with, if any.

    Returns:
        (N // T, T), or (N // (T - 1), T) with ``begin``.

    Raises:
        UserError: there is less than one block.
    """
    length = block_length if begin is None else block_length - 1
    count = len(tokens) // length
    if count == 0:
        raise UserError(
            f"The {name} has {len(tokens)} tokens, less than one block of {block_length}; give more text, or train "
            "with a smaller `block_length`."
        )
    blocks = tokens[: count * length].view(count, length)
    return blocks if begin is None else torch.nn.functional.pad(blocks, (1, 0), value=begin)


def num_predicted(blocks: Tensor) -> int:
    """How many tokens of the blocks, (N, T), a model is trained or measured on: all but the first of each."""
    return blocks.numel() - len(blocks)


def evenly_spaced(blocks: Tensor, count: int) -> Tensor:
    """At most ``count`` blocks from the whole length of a text."""
    return blocks if len(blocks) <= count else blocks[torch.linspace(0, len(blocks) - 1, count).long()]


def count_for(num_tokens: int, blocks: Tensor) -> int:
    """How many of the ``blocks`` (N, T) have about so many tokens, at least one."""
    return max(1, num_tokens // blocks.shape[1])


def without(blocks: Tensor, count: int) -> Tensor:
    """The blocks that :func:`evenly_spaced` leaves out."""
    left = torch.ones(len(blocks), dtype=torch.bool)
    left[torch.linspace(0, len(blocks) - 1, count).long() if len(blocks) > count else slice(None)] = False
    return blocks[left]


def fingerprints(files: Sequence[str]) -> dict[str, Any]:
    """SHA-256 of each file, by :func:`sparsepeft.rows.reading.distinct_names`."""
    paths = [Path(name) for name in files]
    return {name: sha256(path) for name, path in zip(distinct_names(paths), paths, strict=True)}


def _rows(path: Path, column: str, delimiter: str | None, encoding: str | None) -> list[str]:
    texts = []
    # No encoding is guessed: nobody looks at the rows of a corpus, where a wrong guess would show.
    form = find_format(path, delimiter, encoding or marked_encoding(path))
    for row in read_rows(path, form, required=(column,)):
        text = row.values[column]
        if not isinstance(text, str):
            raise UserError(f"{path}:{row.line}: {column!r} is {text!r}, not a text; correct the row.")
        check_text(f"{path}:{row.line}: {column!r}", text)
        texts.append(text)
    return texts


def _hold_out(documents: list[str]) -> tuple[list[str], list[str], str]:
    """Training and validation documents, and how they were split."""
    count = round(_HELD_OUT * len(documents))
    if len(documents) >= 1 / _HELD_OUT:
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(documents)).tolist()
        held_out = set(order[:count])
        rest = [document for index, document in enumerate(documents) if index not in held_out]
        return rest, [documents[index] for index in sorted(held_out)], f"{count} documents were held out for validation"
    ends = [len(document) - round(_HELD_OUT * len(document)) for document in documents]
    training = [document[:end] for document, end in zip(documents, ends, strict=True)]
    validation = [document[end:] for document, end in zip(documents, ends, strict=True)]
    return training, validation, "the last tenth of the text was held out for validation"
