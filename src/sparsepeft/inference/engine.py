"""One backbone, many tasks, one call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsepeft.arguments import check_flag, check_whole
from sparsepeft.backbones import public_name, resolve_model
from sparsepeft.devices import find_device
from sparsepeft.errors import UserError, first_line
from sparsepeft.inference.answering import (
    WINDOW,
    Answers,
    Cutting,
    Engine,
    Row,
    batch_logits,
    collate,
    grouped,
    try_out,
    user_errors,
)
from sparsepeft.inference.encoding import Encoder, batches_by_length, windows
from sparsepeft.inference.entities import EntityOptions, Strategy, entity_options
from sparsepeft.inference.portable import (
    Input,
    InputError,
    OnError,
    Prediction,
    as_list,
    check_on_error,
    find_task,
    read_input,
)
from sparsepeft.inference.tasks import LoadedTask, check_weights, info_of_run, read_task
from sparsepeft.inference.views import (
    SharedView,
    View,
    serving_copy,
    sharing_tensors,
    with_own_feed_forwards,
    with_own_head,
)
from sparsepeft.methods.models import (
    TrainedRun,
    attach_trained,
    load_tokenizer,
    load_trained,
    loading_adapter,
    not_loaded,
    set_pad_token,
    with_pad_token,
)
from sparsepeft.models.blocks import find_blocks
from sparsepeft.models.head_search import find_head
from sparsepeft.models.identity import is_sparse
from sparsepeft.models.onednn import is_onednn_faster, use_onednn
from sparsepeft.models.token_heads import token_model
from sparsepeft.reprs import first_of
from sparsepeft.runs.config import RunConfig
from sparsepeft.runs.files import RUN, read_run, spec_of
from sparsepeft.tuners.config import DTYPES
from sparsepeft.tuners.layer import execution_device

# Those of transformers whose outputs are not the logits of whole texts.
_OTHER_MODELS = (
    *(MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_PRETRAINING_MAPPING),
    *(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    *(MODEL_FOR_QUESTION_ANSWERING_MAPPING, MODEL_FOR_MULTIPLE_CHOICE_MAPPING),
)
# Whose adapters a batch may mix. The others' tasks are answered one after the other, by models of their own.
_ROUTED_METHODS = ("spartan", "pfeiffer", "houlsby", "bitfit", "head")


class MultiTaskEngine(Engine):
    """Answers many tasks from one copy of a backbone.

    A call takes inputs of any tasks. They are sorted by length and batched by a budget of tokens; each batch is one
    pass of the backbone in which every row uses its own task's adapter and head. Row by row the answers are those of
    the task alone. Calls may run in several threads, and tasks may be added, replaced and removed meanwhile: a call
    uses the tasks as they were when it began, the next call sees the change.

    Args:
        backbone: a hub id, a local folder, or a loaded model with a classification head (it is not changed, and its
            weights are shared); None is the bundled MiniLM.
        tasks: folder of each task by its name, as written by ``sparsepeft train``, with any method; or by
            ``save_pretrained``, with SPARTAN, bottleneck, BitFit or head-only adapters. Tasks of one of these methods
            share batches. The others (LoRA, IA3, sparse and fully tuned ones) are batched by themselves, in a model
            that shares the backbone's weights; a fully tuned task brings a model of its own.
        tokenizer: None takes the backbone's.
        dtype: of the backbone where it is loaded here, as PyTorch's or by name (``"bf16"``). In bfloat16 a pass takes
            about a third of the time on processors that multiply it; adapters and heads stay in float32.
        device: where to compute; None leaves a loaded model where it is.
        token_budget: tokens of a batch, padding included; may be changed between calls.
        onednn: compute linear layers on a CPU by oneDNN's operator for them; None compares it with PyTorch's own choice
            when the first task is loaded, and takes the faster one.

    Raises:
        UserError: the backbone or a task cannot be loaded; the message says which and why.

    Example:
        >>> engine = MultiTaskEngine("FacebookAI/roberta-base", tasks={"sst2": "out/sst2", "rte": "out/rte"})
        >>> answers = engine.predict([("sst2", "a fine film"), ("rte", ("A man sleeps.", "Someone is asleep."))])
        >>> answers[0].label in ("positive", "negative")
        True
    """

    def __init__(
        self,
        backbone: str | Path | PreTrainedModel | None = None,
        tasks: Mapping[str, str | Path] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        token_budget: int = 4096,
        onednn: bool | None = None,
    ) -> None:
        super().__init__(check_whole("token_budget", token_budget))
        if onednn is not None:
            check_flag("onednn", onednn)
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"`tokenizer` is {tokenizer!r:.80} ({type(tokenizer).__name__}); expected a loaded tokenizer, as "
                "AutoTokenizer.from_pretrained gives it, or None for the backbone's."
            )
        torch_dtype = _dtype(dtype)
        if tasks is not None and not isinstance(tasks, Mapping):
            raise UserError(
                f"`tasks` is {tasks!r:.80} ({type(tasks).__name__}); expected the folder of each task by its name, "
                'such as {"sst2": "out/sst2"}.'
            )
        place = None if device is None else find_device(str(device))
        if isinstance(backbone, PreTrainedModel):
            _check_classifier(backbone)
            model = sharing_tensors(backbone)
        else:
            if backbone is not None and not isinstance(backbone, (str, Path)):
                remedy = (
                    "pass its base model, without an adapter"
                    if isinstance(backbone, PeftModel)
                    else "expected a hub id, a folder, a loaded transformers model, or None for the bundled one"
                )
                raise UserError(f"`backbone` is a {type(backbone).__name__}; {remedy}.")
            model = load_backbone(resolve_model(None if backbone is None else str(backbone)), torch_dtype)
        if tokenizer is None:
            tokenizer = load_tokenizer(str(model.name_or_path))
        else:
            tokenizer = with_pad_token(copy.deepcopy(tokenizer))
        set_pad_token(model, tokenizer)
        if place is not None:
            _move(model, place)
        self._backbone, self._device = model, execution_device(model) or model.device
        self._encoder = Encoder(tokenizer, model.config)
        self._onednn = onednn
        self._views: dict[str, SharedView] = {}  # by PEFT method
        self._numbers = itertools.count()
        for task, folder in (tasks or {}).items():
            self.add(task, folder)

    def __repr__(self) -> str:
        names = self.tasks
        tasks = f"{len(names)} task{'s' * (len(names) != 1)}" + (f": {first_of(names)}" if names else "")
        dtype = str(self._backbone.dtype).removeprefix("torch.")
        return f"MultiTaskEngine({self.backbone_name!r}, {dtype} on {self._device}, {tasks})"

    @property
    def token_budget(self) -> int:
        """Tokens of a batch, padding included."""
        assert self._token_budget is not None
        return self._token_budget

    @token_budget.setter
    def token_budget(self, value: int) -> None:
        self._token_budget = check_whole("token_budget", value)

    @property
    def backbone_name(self) -> str:
        """The backbone's hub id, or its folder's name."""
        return public_name(str(self._backbone.name_or_path))

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's."""
        dtype: torch.dtype = self._backbone.dtype
        return dtype

    @property
    def longest_input(self) -> int:
        """Tokens an input may have where its task does not say."""
        return self._encoder.longest(None)

    # -- tasks -------------------------------------------------------------------------------------------------------

    @user_errors()
    def add(self, name: str, folder: str | Path) -> None:
        """Load a task under a new name.

        Raises:
            UserError: the name is taken or no text, or the folder cannot be used; the engine is as before.
        """
        path = _path(folder)
        self._tasks.add(name, lambda: self._load(path))

    @user_errors()
    def replace(self, name: str, folder: str | Path) -> None:
        """Put another version of a task in its place; calls that run finish with the former one.

        Raises:
            UserError: there is no such task, or the folder cannot be used; the former version stays.
        """
        path = _path(folder)
        self._tasks.replace(name, lambda: self._load(path))

    @user_errors()
    def remove(self, name: str) -> None:
        """Forget a task; calls that run finish with it.

        Raises:
            UserError: there is no such task.
        """
        self._tasks.replace(name, lambda: None)

    def _load(self, folder: Path) -> LoadedTask:
        if not (folder / RUN).is_file():
            return self._load_shared(folder)
        run = read_run(folder)
        info_of_run(folder, run)  # a language model is refused by name
        check_weights(folder)
        config = RunConfig(**run["config"])
        # Routers can share a batch with others if the backbone itself is sparse.
        is_routed = config.method in _ROUTED_METHODS and (config.spt is None or is_sparse(self._backbone))
        return self._load_shared(folder) if is_routed else self._load_alone(folder, run)

    def _load_shared(self, folder: Path) -> LoadedTask:
        info, config = read_task(folder)
        view = self._views.get(config.method) or SharedView(self._backbone, onednn=self._uses_onednn())
        adapter_name = self._next_name()
        task = LoadedTask(info, view, adapter_name, self._encoder, view.load(folder, adapter_name))
        try:
            try_out(task)
        except BaseException:
            view.delete(adapter_name)
            raise
        self._views[config.method] = view
        return task

    def _load_alone(self, folder: Path, run: dict[str, Any]) -> LoadedTask:
        config, spec, info = RunConfig(**run["config"]), spec_of(run), info_of_run(folder, run)
        if config.method == "full":
            model: Any = load_trained(TrainedRun(folder, config.method, str(folder)), spec)
            model.to(device=self._device, dtype=self._backbone.dtype)
            model.config.use_cache = False
            encoder = Encoder(load_tokenizer(str(folder)), model.config)
        else:
            backbone, encoder, spt = serving_copy(self._backbone), self._encoder, config.spt_config()
            if info.labels_tokens:
                backbone = token_model(backbone, spec.num_labels)
            head, was_sparse = find_head(backbone, find_blocks(backbone)), is_sparse(backbone)
            if was_sparse and spt is None:
                raise UserError(
                    f"The run in {folder} was trained on the dense model, but the engine's backbone is sparse; pass "
                    "the dense backbone."
                )
            with loading_adapter(folder):
                if config.method not in _ROUTED_METHODS:  # the others bring a head of their size
                    with_own_head(backbone, head, spec.num_labels)
                if spt is not None and not was_sparse:
                    with_own_feed_forwards(backbone, spt)
            fingerprint = None if was_sparse else run.get("backbone_fingerprint")
            is_made_sparse = spt is not None and not was_sparse
            trained = TrainedRun(folder, config.method, str(backbone.name_or_path), is_made_sparse, fingerprint)
            model = attach_trained(backbone, trained, head.modules)
        if self._uses_onednn():
            use_onednn(model)
        task = LoadedTask(info, View(model, self._device, labels_tokens=info.labels_tokens), self._next_name(), encoder)
        try_out(task)
        return task

    def _uses_onednn(self) -> bool:
        return is_onednn_faster(self._backbone.dtype) if self._onednn is None else self._onednn

    def _next_name(self) -> str:
        return f"task{next(self._numbers)}"

    # -- answers -----------------------------------------------------------------------------------------------------

    @user_errors()
    def predict_all(
        self,
        texts: Iterable[Input],
        tasks: Sequence[str] | None = None,
        *,
        truncation: bool = True,
        on_error: OnError = "return",
        aggregation_strategy: Strategy | None = None,
        ignore_labels: Iterable[str] = ("O",),
    ) -> list[dict[str, Prediction]]:
        """Answer several tasks for each input, given as for :meth:`predict`.

        The layers below the lowest adapter of the tasks (``layers_to_transform``) run once for a text, the others once
        for each task.

        Args:
            texts: any number; memory beside the answers does not grow with it.
            tasks: which; None for all that take as many texts as an input has.
            truncation, on_error, aggregation_strategy, ignore_labels: as for :meth:`predict`.

        Returns:
            For each input the predictions by task.

        Raises:
            UserError: ``tasks`` names one that is not loaded.
        """
        check_on_error(on_error)
        check_flag("truncation", truncation)
        options = entity_options(aggregation_strategy, ignore_labels)
        answers: list[dict[str, Prediction]] = []
        with self._tasks.in_use() as loaded:
            names = loaded if tasks is None else as_list(tasks)
            chosen = {name: find_task(name, loaded) for name in names}
            for window in windows(as_list(texts), WINDOW):
                predictions: dict[tuple[str, int], Prediction] = {}
                for alike in grouped(enumerate(window), lambda one: _num_texts(one[1])):
                    count = _num_texts(alike[0][1])
                    asked = [
                        one for one in chosen.items() if tasks is not None or count is None or _takes(one[1], count)
                    ]
                    for group in grouped(asked, partial(_shareable, count)):
                        # What is encoded for a task that labels tokens serves all, but not the other way round.
                        first, _ = max(group, key=lambda named: named[1].info.labels_tokens)
                        failed: dict[int, Prediction] = {}
                        requests = [(place, (first, text)) for place, text in alike]
                        rows = self._encode(requests, chosen, Cutting(truncation), on_error, failed)
                        predictions |= {(name, place): answer for place, answer in failed.items() for name, _ in group}
                        for batch in batches_by_length([len(row) for row in rows], self.token_budget):
                            predictions |= self._fan_out([rows[i] for i in batch], group, options)
                answers += [
                    {name: predictions[name, place] for name in chosen if (name, place) in predictions}
                    for place in range(len(window))
                ]
        return answers

    @torch.inference_mode()
    def _fan_out(
        self, rows: list[Row], tasks: list[tuple[str, LoadedTask]], options: EntityOptions
    ) -> dict[tuple[str, int], Prediction]:
        """Answer all ``tasks`` for each of the rows, the lower layers once; by task and place."""
        view = tasks[0][1].view
        num_shared = min(view.num_shareable_layers, *(task.lowest_layer for _, task in tasks))
        states = view.lower_states(collate(rows), num_shared) if num_shared else None
        found: dict[str, Answers] = {name: Answers(options) for name, _ in tasks}
        for part in windows(tasks, max(1, self.token_budget // (len(rows) * max(map(len, rows))))):
            repeated = [replace(row, task=task) for _, task in part for row in rows]
            logits = batch_logits(repeated, num_shared, None if states is None else states.repeat(len(part), 1, 1))
            names = [name for name, _ in part for _ in rows]
            for name, row, values in zip(names, repeated, logits, strict=True):
                found[name].put(row, values)
        return {(name, place): one for name, each in found.items() for place, one in each.predictions.items()}


def _shareable(count: int | None, named: tuple[str, LoadedTask]) -> tuple[Any, ...]:
    """What tasks must have in common to be answered together for inputs of ``count`` texts (None: no texts)."""
    task = named[1]
    errors = () if count is not None and _takes(task, count) else (task.info.num_texts, task.info.labels_tokens)
    return task.view, errors, task.max_length, task.lowest_layer > 0


def _takes(task: LoadedTask, count: int) -> bool:
    return task.info.num_texts in (None, count)


def _num_texts(value: Any) -> int | None:
    """How many texts an input has; None if it is none, or token ids."""
    try:
        return len(read_input(value))
    except InputError:
        return None


def _check_classifier(model: PreTrainedModel) -> None:
    """Refuse a model that transformers has for something else than whole texts; one of its own making may be anything.

    Raises:
        UserError: it is such a model.
    """
    others = (mapping.get(type(model.config), ()) for mapping in _OTHER_MODELS)
    if any(type(model) in (classes if isinstance(classes, tuple) else (classes,)) for classes in others):
        raise UserError(
            f"`backbone` is a {type(model).__name__}, which does not classify texts; pass the model as "
            "AutoModelForSequenceClassification loads it, or its hub id or folder."
        )


def load_backbone(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A backbone with a classification head, from a hub id or a folder.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("model", name, error)) from error


def _dtype(value: Any) -> torch.dtype:
    """A dtype that a backbone can have, given as PyTorch's or by its name."""
    dtype = getattr(torch, DTYPES[value]) if isinstance(value, str) and value in DTYPES else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"`dtype={value!r}` was given; expected torch.float32, torch.bfloat16, torch.float16 or "
            "torch.float64, or fp32, bf16 or fp16."
        )
    return dtype


def _path(folder: Any) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise UserError(
            f"A task's folder is {folder!r:.80} ({type(folder).__name__}); expected a path, such as 'out/sst2'."
        ) from None


def _move(model: torch.nn.Module, device: torch.device) -> None:
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(
            f"`device={device}` was given, but accelerate decides where the parts of this model compute; leave "
            "device out."
        )
    try:
        model.to(device)
    except (RuntimeError, ValueError) as error:  # such as too little memory, or quantized weights that stay
        raise UserError(f"The model cannot be moved to `device={device}` ({first_line(error)}).") from error
