"""From an input to its texts and from logits to a prediction, without PyTorch.

An export copies this file next to its ``run.py``, so that a text is answered there as it is here: it imports nothing
but NumPy and the standard library.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import unicodedata
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

Text = str | tuple[str, str]
OnError = Literal["return", "raise"]
TruncationSide = Literal["left", "right"]
Input = Text | Sequence[str] | Mapping[str, str | Sequence[str]]
Task = TypeVar("Task")

_KEYS = ("text", "text_pair")  # of an input that is a dictionary, as in transformers' pipelines
_TOKENS = "tokens"  # of one that is in tokens already
NO_TOKENS = "An input has no character that the tokenizer knows; pass some words."
NAN = float("nan")  # the one, so that predictions which have it are equal
NOT_FINITE = "The model's output for this input is not a finite number; train it again."


class InputError(ValueError):
    """What was asked cannot be answered; the message says what was received, what was expected and what to do."""


# -- inputs ------------------------------------------------------------------------------------------------------------


class SplitText(str):
    """A text of tokens with a space between, each of which is a word, whatever is in it.

    Args:
        tokens: the words.
    """

    tokens: tuple[str, ...]
    _starts: list[int]

    def __new__(cls, tokens: Sequence[str]) -> SplitText:
        """Join the tokens."""
        text = super().__new__(cls, " ".join(tokens))
        text.tokens = tuple(tokens)
        text._starts = list(accumulate((len(token) + 1 for token in tokens), initial=0))
        return text

    def __getnewargs__(self) -> tuple[Any, ...]:
        """For copies and other processes."""
        return (self.tokens,)

    def token_at(self, place: int) -> int:
        """Which token the character at a place belongs to."""
        return bisect_right(self._starts, place) - 1

    def bounds_at(self, place: int) -> tuple[int, int]:
        """Where that token begins and ends, without white space at its edges."""
        index = self.token_at(place)
        token, start = self.tokens[index], self._starts[index]
        return start + len(token) - len(token.lstrip()), start + len(token.rstrip())


def read_input(value: Any) -> tuple[str, ...]:
    """The text, or the two texts, of one input.

    Args:
        value: a text, a tuple or list of one or two, or a dictionary with ``text`` and, for a pair, ``text_pair``; or
            with ``tokens``, a list of words, which are read as a text with a space between them (:class:`SplitText`).

    Raises:
        InputError: it is none of these, or a text is not valid Unicode.
    """
    texts: tuple[Any, ...] = ()
    if isinstance(value, str):
        texts = (value,)
    elif isinstance(value, Mapping) and "text" in value and value.keys() <= set(_KEYS):
        texts = tuple(value[key] for key in _KEYS if value.get(key) is not None)
    elif isinstance(value, Mapping) and value.keys() == {_TOKENS}:
        texts = (_split_text(value[_TOKENS]),)
    elif isinstance(value, (tuple, list)):
        texts = tuple(value)
    if len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"An input is {value!r:.80} ({type(value).__name__}); expected a text, a pair of texts, or a dictionary "
            "with text and text_pair, or with tokens alone."
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= text[error.start] <= "\udcff":  # as Python's "surrogateescape" has them
                raise InputError(
                    f"An input has a byte at position {error.start} that is not UTF-8; read it in its own encoding."
                ) from None
            raise InputError(
                f"An input has {text[error.start]!a} at position {error.start}, half of a surrogate pair, which is no "
                "character; decode the text again, or replace it."
            ) from None
    return texts


def _split_text(tokens: Any) -> SplitText:
    if not isinstance(tokens, (tuple, list)) or not tokens:
        raise InputError(f"The tokens of an input are {tokens!r:.80}; pass a list of one text or more.")
    for number, token in enumerate(tokens, 1):
        if not isinstance(token, str) or not token.strip():
            raise InputError(f"Token {number} of an input is {token!r:.80}; pass a text that is not empty.")
    return SplitText(tokens)


def texts_of(value: Any, num_texts: int | None, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """The text, or the two texts, of an input of a task.

    Args:
        value: as for :func:`read_input`.
        num_texts: how many texts an input of the task has; None takes one or two.
        may_be_empty: accept empty texts, which some data sets have.

    Raises:
        InputError: it is no input, has an empty text, or another number of texts than the task takes.
    """
    texts = read_input(value)
    if num_texts not in (None, len(texts)):
        raise InputError(f"The task takes {num_texts} text(s) per input, but {len(texts)} came; pass as many.")
    if not may_be_empty and not all(text.strip() for text in texts):
        raise InputError("An input has an empty text; pass some words.")
    return texts


def as_list(inputs: Iterable[Any]) -> Iterable[Any]:
    """The inputs of a call, of which a single text or dictionary is a list of one, as in transformers' pipelines.

    Raises:
        InputError: it is no list.
    """
    if isinstance(inputs, (str, Mapping)):
        return [inputs]
    if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
        raise InputError(f"{inputs!r:.80} ({type(inputs).__name__}) was given; expected a list of inputs.")
    return inputs


def find_task(name: Any, tasks: Mapping[str, Task]) -> Task:
    """The task of this name.

    Raises:
        InputError: there is none, or the name is no text.
    """
    check_task_name(name)
    if name in tasks:
        return tasks[name]
    if not tasks:
        raise InputError(f"The task {name!r} is unknown, as no task is loaded; add() one first.")
    near = difflib.get_close_matches(name, tasks, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(f"The task {name!r} is unknown; valid are {', '.join(sorted(tasks))}{hint}")


def check_task_name(name: Any) -> None:
    """See that a task's name is a text.

    Raises:
        InputError: it is none, or empty.
    """
    if not isinstance(name, str) or not name:
        raise InputError(
            f"The task {name!r:.80} ({type(name).__name__}) was given; a task's name is a text that is not empty."
        )


def check_on_error(value: Any) -> None:
    """See that ``on_error`` is one of its values.

    Raises:
        InputError: it is not.
    """
    if value not in get_args(OnError):
        raise InputError(f"`on_error={value!r}` was given; pass {' or '.join(map(repr, get_args(OnError)))}.")


def check_truncation_side(value: Any) -> None:
    """See that ``truncation_side`` is one of its values, or None.

    Raises:
        InputError: it is not.
    """
    if value is not None and value not in get_args(TruncationSide):
        raise InputError(
            f"`truncation_side={value!r}` was given; pass {' or '.join(map(repr, get_args(TruncationSide)))}."
        )


# -- predictions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entity:
    """A token, or several that belong together, and what a model says about them.

    Attributes:
        label: of the token (``"B-PER"``), or of the group (``"PER"``).
        score: its probability; that of a group is the mean.
        word: the characters of the text from ``start`` up to ``end``.
        start, end: places in the text.
    """

    label: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input.

    Attributes:
        label: the most probable label; None for regression, where tokens are labelled, and where there is an error.
        score: its probability, or the predicted value; NaN where tokens are labelled, and where there is an error.
        scores: probability of every label; empty for regression, and where tokens are labelled.
        truncated: whether the input was longer than the task takes and was cut, as in training.
        error: why there is no answer; None where there is one.
        labels: where several may hold, those whose probability is above their threshold (0.5, if training chose none),
            in the task's order; else None.
        logits: what the probabilities were made of, one for each label, or the predicted value.
        num_tokens: of the input as the model read it; 0 where it was not noted.
        entities: where tokens are labelled, those that were found, in the text's order; else None.
    """

    label: str | None
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    truncated: bool = False
    error: str | None = None
    labels: tuple[str, ...] | None = None
    logits: tuple[float, ...] = field(default=(), repr=False, compare=False)
    num_tokens: int = field(default=0, repr=False, compare=False)
    entities: tuple[Entity, ...] | None = None

    @classmethod
    def failed(cls, error: str) -> Prediction:
        """The place of an answer that could not be given."""
        return cls(None, NAN, error=error)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``label``, ``score``, ``scores``, and the others where they say something.

        Where tokens are labelled it is ``entities`` instead of these; where there is an error, ``error`` alone.
        """
        if self.error is not None:
            return {"error": self.error}
        more = {"labels": list(self.labels)} if self.labels is not None else {}
        cut = {"truncated": True} if self.truncated else {}
        if self.entities is not None:
            return {"entities": [asdict(entity) for entity in self.entities], **cut}
        return {"label": self.label, "score": self.score, "scores": self.scores, **more, **cut}


def prediction(
    logits: np.ndarray,
    label_names: Sequence[str] | None,
    *,
    multi_label: bool = False,
    thresholds: Sequence[float] | None = None,
    truncated: bool = False,
    num_tokens: int = 0,
) -> Prediction:
    """The prediction that logits stand for.

    Args:
        logits: (num_labels,).
        label_names: one for each; None for regression.
        multi_label: labels do not exclude each other, so that each has a probability of its own.
        thresholds: above which each of these labels holds; None is 0.5 for all.
        truncated, num_tokens: see :class:`Prediction`.

    Returns:
        One with an error where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return Prediction.failed(NOT_FINITE)
    known: dict[str, Any] = {"truncated": truncated, "logits": tuple(logits.tolist()), "num_tokens": num_tokens}
    if label_names is None:
        return Prediction(None, float(logits[0]), **known)
    if multi_label:
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    else:
        shifted = np.exp(logits - logits.max())
        probabilities = shifted / shifted.sum()
    scores = dict(zip(label_names, probabilities.tolist(), strict=True))
    best = max(scores, key=lambda label: scores[label])
    several = None
    if multi_label:
        limits = [0.5] * len(scores) if thresholds is None else thresholds
        several = tuple(label for (label, score), limit in zip(scores.items(), limits, strict=True) if score > limit)
    return Prediction(best, scores[best], scores, labels=several, **known)


def entities_in(
    text: str,
    offsets: Sequence[tuple[int, int]],
    logits: np.ndarray,
    label_names: Sequence[str],
    *,
    by_word: bool = False,
    joined: bool = True,
    ignore_labels: Collection[str] = ("O",),
) -> tuple[Entity, ...]:
    """The entities in a text, in its order.

    Args:
        text: as it was given.
        offsets: of each token's first character and of the one after its last; special tokens left out.
        logits: (tokens, num_labels).
        label_names: by index. ``B-``, ``I-``, ``E-`` and ``S-`` say where in an entity a token is.
        by_word: the first token of a word speaks for all of it, as it was trained to. A word ends at white space,
            punctuation at its edges is apart, and an ideograph is one; those of a :class:`SplitText` are its own.
        joined: neighbours of one label are an entity, of which ``B-`` begins another; else each token, or word, is by
            itself, whatever its label.
        ignore_labels: entities that are left out where they are joined.
    """
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    units: list[Entity] = []
    space: tuple[int, np.ndarray] | None = None  # where a token that is a space alone ends, and what it says
    for (start, end), row in zip(offsets, shifted / shifted.sum(axis=-1, keepdims=True), strict=True):
        if by_word:
            begin, start = start, start + len(text[start:end]) - len(text[start:end].lstrip())
            if start >= end:
                if begin < end:  # of several such tokens the first speaks for the word
                    space = (end, row if space is None or begin > space[0] else space[1])
                continue
            is_same = bool(units) and _are_one_word(text, units[-1], start)
            start, end = _whole(text, start, end)
            if is_same:
                end = max(end, units[-1].end)
                units[-1] = replace(units[-1], word=text[units[-1].start : end], end=end)
                continue
            if space is not None and space[0] == begin == start:  # the first token of this word was the space before
                row = space[1]
        best = int(row.argmax())
        units.append(Entity(label_names[best], float(row[best]), text[start:end], start, end))
    if not joined:
        return tuple(units)
    groups: list[list[Entity]] = []
    for unit in units:
        place, kind = _place_and_kind(unit.label)
        before, kind_before = _place_and_kind(groups[-1][-1].label) if groups else ("", None)
        is_alike = kind == kind_before and bool(place) == bool(before)
        if is_alike and place not in ("B", "S") and before not in ("E", "S"):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return tuple(
        Entity(kind, float(np.mean([one.score for one in group])), text[start:end], start, end)
        for group in groups
        for place, kind in [_place_and_kind(group[0].label)]
        for start, end in [(group[0].start, group[-1].end)]
        if kind not in ignore_labels or (place and kind == "O")  # a type may be called so; its tags are B-O and I-O
    )


def shared_tokens(num_tokens: int) -> int:
    """How many tokens neighbouring parts of a long text share, each of ``num_tokens``: the later has some context."""
    return num_tokens // 4


def without_overlap(
    parts: Sequence[tuple[Sequence[tuple[int, int]], Sequence[int], np.ndarray]], stride: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Put the parts of a text together, special tokens left out.

    Args:
        parts: in the text's order: for each token its place in the text, whether it is a special one, and its logits,
            (T, num_labels).
        stride: how many tokens a part shares with the one before, from which they are taken.

    Returns:
        Places of the text's tokens, and their logits (tokens, num_labels).
    """
    offsets: list[tuple[int, int]] = []
    rows: list[np.ndarray] = []
    for number, (places, special_tokens_mask, logits) in enumerate(parts):
        own = [index for index, is_special in enumerate(special_tokens_mask) if not is_special][
            stride if number else 0 :
        ]
        offsets += [places[index] for index in own]
        rows.append(logits[own])
    return offsets, np.concatenate(rows)


def _place_and_kind(label: str) -> tuple[str, str]:
    """Of ``B-PER`` both parts; a label without such a beginning is all kind."""
    return (label[0], label[2:]) if label[:2] in ("B-", "I-", "E-", "S-") and label[2:] else ("", label)


def _are_one_word(text: str, before: Entity, start: int) -> bool:
    """Whether a token that begins at ``start`` is of the same word as what is before it."""
    if isinstance(text, SplitText):
        return text.token_at(before.start) == text.token_at(start)
    return start < before.end or (start == before.end and _is_inside_word(text, start))


def _whole(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's place with the marks on its last character, which a tokenizer may leave out; or its whole word's."""
    if isinstance(text, SplitText):
        return text.bounds_at(start)
    return start, next((place for place in range(end, len(text)) if not _is_mark(text[place])), len(text))


def _is_mark(char: str) -> bool:
    """Whether it is written on, or joins, the character before it: an accent, a vowel sign, a variation selector."""
    return unicodedata.category(char).startswith("M") or char in "\u200c\u200d"


def _is_inside_word(text: str, place: int) -> bool:
    """Whether the characters before and at a place are of one word: ``O'Neil`` is one, with the comma behind it not."""
    if _is_mark(text[place]):
        return not text[place - 1].isspace()
    before = next((text[index] for index in range(place - 1, -1, -1) if not _is_mark(text[index])), "")
    if any(unicodedata.name(char, "").startswith("CJK") for char in (before, text[place]) if char):
        return False
    return _meets_letter(text, range(place - 1, -1, -1)) and _meets_letter(text, range(place, len(text)))


def _meets_letter(text: str, places: Iterable[int]) -> bool:
    """Whether a letter or digit comes before white space."""
    return next((text[place].isalnum() for place in places if text[place].isspace() or text[place].isalnum()), False)


# -- exported folders --------------------------------------------------------------------------------------------------


class ExportedTasks(ABC):
    """The tasks of an exported folder. A subclass, ``Runner`` in ``run.py``, computes by one runtime.

    Args:
        folder: the exported one.
        tokenizer: of the library tokenizers, with padding enabled.
        graph: the backbone's name, which every task's ``task.json`` repeats.

    Attributes:
        tasks: each ``task.json`` by the task's name.
    """

    weights: str  # name of the file that a task's adapter is read from

    def __init__(self, folder: str | Path, tokenizer: Any, graph: str) -> None:
        self.folder, self.tokenizer, self.graph = Path(folder), tokenizer, graph
        self.tasks: dict[str, dict[str, Any]] = {
            file.parent.name: json.loads(file.read_bytes()) for file in self.folder.glob("tasks/*/task.json")
        }
        self._adapters: dict[str, Any] = {}

    @abstractmethod
    def load(self, file: Path) -> Any:
        """A task's adapter, from its file."""

    @abstractmethod
    def logits(self, adapter: Any, inputs: dict[str, np.ndarray], of_tokens: bool = False) -> np.ndarray:
        """From integers (B, T) by name: ``input_ids``, ``attention_mask``, ``token_type_ids``.

        Returns:
            (B, num_labels), or with ``of_tokens`` (B, T, num_labels).
        """

    def answer(
        self, name: str, texts: Iterable[Input], batch_size: int = 8, joined: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Yield a dictionary with ``label``, ``score`` and ``scores`` for each input, see :meth:`Prediction.to_dict`.

        Where the task labels tokens it is ``entities``, and a text that is longer than the task takes is not cut, but
        read in parts that share a quarter of their tokens.

        Args:
            texts: each a text, a pair, or a dictionary with ``text`` and ``text_pair``.
            batch_size: inputs of a pass.
            joined: tokens are put together to entities, see :func:`entities_in`; else there is one for each token.

        Raises:
            InputError: the task is unknown, or an input cannot be answered.
            ValueError: the task's files are damaged, or belong to another backbone.
        """
        task = find_task(name, self.tasks)
        if batch_size < 1:
            raise InputError(f"`batch_size={batch_size}` was given; pass the number of inputs of a pass, at least 1.")
        inputs = [texts_of(value, task["num_texts"]) for value in as_list(texts)]
        adapter = self._adapter(name)
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            wholes = self._encode(task, batch)
            rows = [part for parts in wholes for part in parts]
            passes = (self._pass(task, adapter, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
            logits = chain.from_iterable(passes)
            for (text, *_), parts in zip(batch, wholes, strict=True):
                if task.get("labels_tokens", False):
                    of_parts = list(zip(parts, islice(logits, len(parts)), strict=True))
                    yield _of_tokens(task, text, of_parts, self._stride(task), joined).to_dict()
                else:
                    options = {"multi_label": task["multi_label"], "truncated": bool(parts[0].overflowing)}
                    row, thresholds = next(logits).astype(float), task.get("thresholds")
                    yield prediction(row, task["labels"], thresholds=thresholds, **options).to_dict()

    def _encode(self, task: dict[str, Any], inputs: Sequence[tuple[str, ...]]) -> list[list[Any]]:
        """The encoding of each input, or those of its parts where tokens are labelled.

        Raises:
            InputError: one has no token.
        """
        of_tokens = task.get("labels_tokens", False)
        # Each time: another task may have answered meanwhile.
        stride, side = (self._stride(task), "right") if of_tokens else (0, task.get("truncation_side", "right"))
        self.tokenizer.enable_truncation(task["max_length"], stride=stride, direction=side)
        encoded = self.tokenizer.encode_batch([texts if texts[1:] else texts[0] for texts in inputs])
        if not all(any(one.attention_mask) for one in encoded):
            raise InputError(NO_TOKENS)
        return [[one, *one.overflowing] if of_tokens else [one] for one in encoded]

    def _stride(self, task: dict[str, Any]) -> int:
        return shared_tokens(task["max_length"] - self.tokenizer.num_special_tokens_to_add(False))

    def _pass(self, task: dict[str, Any], adapter: Any, encoded: Sequence[Any]) -> np.ndarray:
        rows = np.array([(one.ids, one.attention_mask, one.type_ids) for one in encoded], "int64")
        keys = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {key: rows[:, i] for i, key in enumerate(keys)}
        return self.logits(adapter, inputs, task.get("labels_tokens", False))

    def _adapter(self, name: str) -> Any:
        if name not in self._adapters:
            task, file = self.tasks[name], self.folder / "tasks" / name / self.weights
            if [task["graph"], task["sha256"]] != [self.graph, hashlib.sha256(file.read_bytes()).hexdigest()]:
                raise ValueError(f"{file} is damaged, or belongs to another backbone; export the task again.")
            self._adapters[name] = self.load(file)
        return self._adapters[name]


def _of_tokens(
    task: dict[str, Any], text: str, parts: Sequence[tuple[Any, np.ndarray]], stride: int, joined: bool
) -> Prediction:
    """The prediction for a text whose tokens are labelled, from the encodings of its parts and their padded logits."""
    if not all(np.isfinite(logits).all() for _, logits in parts):
        return Prediction.failed(NOT_FINITE)
    places = [(part.offsets, part.special_tokens_mask, logits) for part, logits in parts]
    offsets, known = without_overlap(places, stride)
    by_word = task["by_word"] and joined
    return Prediction(
        None, NAN, entities=entities_in(text, offsets, known, task["labels"], by_word=by_word, joined=joined)
    )


def main(runner: type[Any], folder: Path, usage: str) -> None:
    """The command line of ``run.py``: a task, and a text or a pair; else each line of standard input is an input."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.exit(usage)
    name, *texts = sys.argv[1:]
    num_failed = 0
    # A bad line is an error.
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[union-attr]
    try:
        tasks = runner(folder)
        is_single = find_task(name, tasks.tasks)["num_texts"] == 1
        lines = (line.rstrip("\r\n") for line in sys.stdin)
        for each in [texts] if texts else ([line] if is_single else line.split("\t") for line in lines):
            try:
                (answer,) = tasks.answer(name, [each])
            except InputError as error:
                if texts:
                    raise
                answer, num_failed = Prediction.failed(str(error)).to_dict(), num_failed + 1
            print(json.dumps(answer), flush=True)
    except BrokenPipeError:  # whoever reads the answers has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    if num_failed:
        sys.exit(f"Error: {num_failed} inputs could not be answered; the error in their lines says why.")
