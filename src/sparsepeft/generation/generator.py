"""Texts from a fine-tuned language model."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from sparsepeft.arguments import check_flag, check_number, check_whole
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError, first_line
from sparsepeft.inference.answering import user_errors
from sparsepeft.inference.encoding import num_positions, windows
from sparsepeft.inference.portable import as_list
from sparsepeft.inference.tasks import trained_run
from sparsepeft.methods.language_models import load_trained_language_model
from sparsepeft.methods.models import load_tokenizer
from sparsepeft.rows.reading import check_text
from sparsepeft.runs.config import LM
from sparsepeft.runs.corpus import end_token
from sparsepeft.runs.files import read_run
from sparsepeft.tuners.config import dtype_name

_MAX_NEW_TOKENS = 100
_WHOLE: dict[str, tuple[int, int | None]] = {  # least and most
    "max_new_tokens": (1, None),
    "top_k": (0, None),
    "num_return_sequences": (1, None),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is continued; the names are those of :class:`transformers.GenerationConfig`.

    Args:
        max_new_tokens: at most so many tokens are added, fewer where the model ends the text; None is 100, or what the
            model has room for.
        do_sample: draw each token instead of taking the most likely one.
        temperature: of drawing; None is the model's own, or 1.
        top_p: draw from the most likely tokens that have this probability together; None as above.
        top_k: draw from this many tokens, 0 from all; None is the model's own, or 50.
        num_return_sequences: continuations of each prompt, if they are drawn.
        stop_strings: a continuation ends before the first of these; a single text is taken for one of them.
        seed: of drawing. A prompt's continuations depend on it, the prompt and these settings only, not on what else
            is continued.

    Raises:
        UserError: a value cannot be used.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_return_sequences: int = 1
    stop_strings: Sequence[str] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        for name, (least, most) in _WHOLE.items():
            if not self._is_left_out(name):
                object.__setattr__(self, name, check_whole(name, getattr(self, name), least=least, most=most))
        for name in ("temperature", "top_p"):
            if not self._is_left_out(name):
                object.__setattr__(self, name, check_number(name, getattr(self, name), above=0))
        check_flag("do_sample", self.do_sample)
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f"`top_p={self.top_p}` was given, but a probability is at most 1.")
        stops = (self.stop_strings,) if isinstance(self.stop_strings, str) else self.stop_strings
        if not isinstance(stops, (tuple, list)) or not all(isinstance(stop, str) for stop in stops):
            raise UserError(f"`stop_strings={stops!r:.80}` was given; expected a text, or a list of texts.")
        if not all(stops):
            raise UserError("`stop_strings` has an empty text, which every text ends with; leave it out.")
        object.__setattr__(self, "stop_strings", tuple(stops))
        drawn = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        drawn += ["num_return_sequences"] * (self.num_return_sequences > 1)
        if drawn and not self.do_sample:
            raise UserError(
                f"`{drawn[0]}={getattr(self, drawn[0])}` was given, but without `do_sample` the most likely token is "
                "taken each time and there is one continuation; pass `do_sample=True` as well."
            )

    def _is_left_out(self, name: str) -> bool:
        """Whether a value is None, where that is its default."""
        return getattr(self, name) is None and getattr(type(self), name) is None

    def for_model(self) -> dict[str, Any]:
        """Arguments of transformers' ``generate``, but for the lengths."""
        names = ("do_sample", "num_return_sequences", "temperature", "top_p", "top_k")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _Prompt(NamedTuple):
    """Token ids, and how many may be added."""

    ids: list[int]
    room: int


class Generator:
    """A run's language model, ready to continue texts.

    Args:
        folder: the output folder of ``sparsepeft train --task lm``.
        model: the backbone, if it has moved since.
        device: where to compute, see :func:`sparsepeft.devices.find_device`; None takes the accelerator, if any.
        dtype: of the weights: fp32, bf16 or fp16.
        batch_size: prompts that are continued together, where nothing is drawn.
        infer: answer as the ``"sparse"`` model, or as the ``"dense"`` one that it was made from; None as in training.

    Raises:
        UserError: the folder holds no finished training or that of a classifier, its files are damaged, or the
            backbone is another.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "fp32",
        batch_size: int = 8,
        infer: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        run = read_run(self.folder)
        if run["task"] != LM:
            raise UserError(
                f"{self.folder} holds a model for the task {run['task']['name']!r}, which writes no text; use "
                "`sparsepeft predict`."
            )
        self.batch_size = check_whole("batch_size", batch_size)
        try:
            torch_dtype = getattr(torch, dtype_name("dtype", dtype))
        except ValueError as error:
            raise UserError(f"`dtype={dtype}` was given; expected fp32, bf16 or fp16.") from error
        self.device = find_device(device)
        trained = trained_run(self.folder, run, model, infer)
        self.method = trained.method
        self.tokenizer = load_tokenizer(trained.backbone)
        loaded: Any = load_trained_language_model(trained, torch_dtype)
        self.model: Any = loaded.to(self.device)
        self._begin: int | None = run.get("bos_token_id")  # as the blocks it was trained on
        _read_rows_in_one_product(self.model.get_output_embeddings())

    def __repr__(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"Generator({str(self.folder)!r}: {self.method}, {dtype} on {self.device})"

    @user_errors()
    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        *,
        chat: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[list[str]]:
        """The continuations of each prompt, in order, without the prompt.

        Args:
            prompts: texts; a single one is taken for a list of one.
            settings: how they are continued; None takes the likeliest tokens.
            chat: each prompt is what a user says, and the tokenizer's chat template is put around it.
            on_text: receives a continuation piece by piece as it is made, for a single prompt.

        Raises:
            UserError: a prompt is empty or too long (the message gives its number, from 1, where there are several),
                there is no chat template, or ``on_text`` was given for several.
        """
        settings = GenerationSettings() if settings is None else settings
        if not isinstance(settings, GenerationSettings):
            raise UserError(f"`settings={settings!r:.80}` was given; expected GenerationSettings.")
        texts, encoded = list(as_list(prompts)), []
        for number, prompt in enumerate(texts, 1):
            try:
                encoded.append(self._encode(prompt, settings.max_new_tokens, chat))
            except UserError as error:
                raise UserError(f"Prompt {number}: {error}" if len(texts) > 1 else str(error)) from error
        if on_text is not None and (len(encoded) > 1 or settings.num_return_sequences > 1):
            raise UserError("`on_text` goes with one continuation of one prompt; leave it out, or pass one prompt.")
        return self._continue(encoded, settings, on_text)

    def _continue(
        self, prompts: list[_Prompt], settings: GenerationSettings, on_text: Callable[[str], None] | None
    ) -> Iterator[list[str]]:
        size = 1 if settings.do_sample else self.batch_size  # a draw must not depend on the rows beside it
        for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.room):
            for batch in windows(group, size):
                texts = self._texts(batch, settings, on_text)
                for first in range(0, len(texts), settings.num_return_sequences):
                    yield texts[first : first + settings.num_return_sequences]

    def _texts(
        self, prompts: list[_Prompt], settings: GenerationSettings, on_text: Callable[[str], None] | None
    ) -> list[str]:
        """The continuations of prompts with the same room, in one batch."""
        ids = [prompt.ids for prompt in prompts]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(self.device)
        width = batch["input_ids"].shape[1]
        owners = [one for one in ids for _ in range(settings.num_return_sequences)]

        def decode(tokens: Tensor) -> list[str]:
            return [self._decode(prompt, row[width:]) for prompt, row in zip(owners, tokens, strict=True)]

        with torch.inference_mode(), _drawing(settings.seed, self.device):
            tokens = self.model.generate(
                **batch,
                **settings.for_model(),
                max_new_tokens=prompts[0].room,
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=[_Stop(decode, settings.stop_strings)] if settings.stop_strings else None,
                streamer=None if on_text is None else _Continuation(self.tokenizer, on_text),
            )
        return [_before(text, settings.stop_strings) for text in decode(tokens)]

    def _encode(self, prompt: str, max_new_tokens: int | None, chat: bool) -> _Prompt:
        if not isinstance(prompt, str):
            raise UserError(f"The prompt {prompt!r:.80} is no text; pass a text.")
        check_text("The prompt", prompt)
        begin = [] if self._begin is None or chat else [self._begin]  # a template has the token in it
        text = self._in_template(prompt) if chat else prompt
        ids = begin + self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError("An empty prompt was given, and this model has no begin-of-text token; give some text.")
        limit = num_positions(self.model.config)
        room = _MAX_NEW_TOKENS if limit is None else min(_MAX_NEW_TOKENS, limit - len(ids))
        wanted = max_new_tokens or max(room, 1)
        if limit is not None and len(ids) + wanted > limit:
            raise UserError(
                f"A prompt of {len(ids)} tokens was given, to which up to {wanted} are added, but this model takes "
                f"{limit} in all; shorten the prompt" + (" or pass a smaller `max_new_tokens`." if wanted > 1 else ".")
            )
        return _Prompt(ids, wanted)

    def _in_template(self, prompt: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError("`chat=True` was given, but the model's tokenizer has no chat template; leave it out.")
        messages = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a program of the model's author
            raise UserError(
                f"The model's chat template cannot be used ({first_line(error)}); leave out `chat`."
            ) from error

    def _ends(self) -> list[int]:
        """Tokens that end a text: the one between the documents of the training text, and the model's own."""
        ends = self.model.generation_config.eos_token_id
        of_model = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return sorted({end_token(self.tokenizer), *of_model})

    def _decode(self, prompt: list[int], added: Tensor) -> str:
        # Decoded with the prompt, as a tokenizer may drop the space that a text begins with.
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return str(self.tokenizer.decode([*prompt, *added.tolist()], skip_special_tokens=True))[len(before) :]


def _before(text: str, stop_strings: Sequence[str]) -> str:
    """A text up to the first of these."""
    return text[: min((text.index(stop) for stop in stop_strings if stop in text), default=None)]


class _Stop(StoppingCriteria):
    """Ends rows whose continuation has one of the texts to stop at; transformers' own looks at the prompt, too."""

    def __init__(self, decode: Callable[[Tensor], list[str]], stop_strings: Sequence[str]) -> None:
        self._decode, self._stop_strings = decode, stop_strings

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """(B, T) -> (B,)."""
        ended = [any(stop in text for stop in self._stop_strings) for text in self._decode(input_ids)]
        return torch.tensor(ended, device=input_ids.device)


class _Continuation(TextStreamer):
    """Passes on what follows a prompt, as words become complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        """Tokens of the prompt, (1, T), at first; then those that are added, (1,)."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            self.token_cache = value[0].tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache, skip_special_tokens=True))
        else:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What transformers would print."""
        self._on_text(text)


@contextlib.contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Draw by a seed, and leave the state of the random numbers as it was."""
    kind, devices = ("cuda", []) if device.type == "cpu" else (device.type, [device.index or 0])
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _read_rows_in_one_product(head: nn.Module) -> None:
    """Spare a head's weight a copy for each row of a batch.

    A head reads the last position's states, a slice of all. For states in pieces PyTorch multiplies row by row, with
    copies of a weight that needs no gradient: Gemma 3 270M in bfloat16 took 12 s of a CPU for ten tokens after each of
    three prompts, of which 1.3 are left.
    """
    head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
