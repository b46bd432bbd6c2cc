"""Building a model for a method, and reading it back from a run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsepeft.devices import find_device
from sparsepeft.errors import UserError, first_line, unknown_name
from sparsepeft.methods.checkpoint_labels import head_start, start_head
from sparsepeft.methods.targets import choose_targets
from sparsepeft.models.blocks import find_blocks, is_norm
from sparsepeft.models.head_search import find_head
from sparsepeft.models.heads import count_head_parameters, head_parameters
from sparsepeft.models.identity import backbone_parameters, check_fingerprint, fingerprint
from sparsepeft.reprs import first_of
from sparsepeft.spt import load_sparse, sparsification
from sparsepeft.tasks import TaskSpec
from sparsepeft.tuners import BitFitConfig, BottleneckConfig, HeadConfig, SpartanConfig
from sparsepeft.tuners.config import TaskAdapterConfig

Model = PreTrainedModel | PeftModel

_CONFIGS: dict[str, type[PeftConfig]] = {
    "spartan": SpartanConfig,
    "pfeiffer": BottleneckConfig,
    "houlsby": BottleneckConfig,
    "lora": LoraConfig,
    "ia3": IA3Config,
    "bitfit": BitFitConfig,
    "head": HeadConfig,
}
# Set by the task or when attaching; not the user's to choose with --set.
_READ_THE_LAST_PLACE = {"xlnet"}  # model types whose head takes the states there, be it padding
_RESERVED = {
    *(each.name for each in dataclasses.fields(PeftConfig)),
    *("num_labels", "id2label", "problem_type", "backbone_fingerprint", "format_version", "check_backbone"),
    *("save_dtype", "runtime_config"),
}


def adapter_config(
    method: str, settings: dict[str, Any], spec: TaskSpec | None = None, task_type: TaskType = TaskType.SEQ_CLS
) -> PeftConfig | None:
    """The method's PEFT config, or None for full fine-tuning.

    Args:
        method: one of :data:`sparsepeft.methods.recipes.METHODS`.
        settings: keys of the config.
        spec: the task, whose labels go into the config; None to check the settings only, or if there are no labels.
        task_type: PEFT's name of the kind of model.

    Raises:
        UserError: an unknown key, or a value the config refuses.
    """
    if method == "full":
        if settings:
            raise UserError(
                f"The settings {sorted(settings)} were given, but full fine-tuning has no adapter to "
                "configure; leave them out."
            )
        return None
    config_class = _CONFIGS[method]
    valid = {f.name for f in dataclasses.fields(config_class)} - _RESERVED
    for key in settings:
        if key not in valid:
            raise UserError(unknown_name(f"{method} setting", key, valid | {"weight_decay", "warmup_ratio"}))
    labels: dict[str, Any] = {}
    if spec is not None and issubclass(config_class, TaskAdapterConfig):
        labels = {"num_labels": spec.num_labels, "problem_type": loss_of(spec), "id2label": id2label(spec)}
    try:
        return config_class(task_type=task_type, **settings, **labels)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def id2label(spec: TaskSpec) -> dict[int, str]:
    """Names of the task's outputs."""
    return dict(enumerate(spec.label_names)) if spec.label_names else {0: "score"}


def loss_of(spec: TaskSpec) -> str | None:
    """What a config of transformers says of the loss; nothing where tokens are labelled, which have one only."""
    return None if spec.labels_tokens else spec.problem_type


def task_type_of(spec: TaskSpec | None) -> TaskType:
    """PEFT's name of the kind of model; a language model has no ``spec``."""
    if spec is None:
        return TaskType.CAUSAL_LM
    return TaskType.TOKEN_CLS if spec.labels_tokens else TaskType.SEQ_CLS


def load_backbone(model: str, spec: TaskSpec, *, is_trained: bool = False) -> PreTrainedModel:
    """The backbone with a classification head for the task: a checkpoint's where its labels are the task's, else fresh.

    Args:
        model: hub id or folder.
        spec: the task.
        is_trained: it is a fully tuned run's, which has weights for all of the model.

    Raises:
        UserError: there is no such model, or weights of a trained one are missing.
    """
    names = id2label(spec)
    try:
        checkpoint_names = AutoConfig.from_pretrained(model).id2label or {}
        start = head_start(checkpoint_names, spec.label_names)
        loaded = names if start.rows is None else checkpoint_names
        auto_class: Any = AutoModelForTokenClassification if spec.labels_tokens else AutoModelForSequenceClassification
        backbone, loading = auto_class.from_pretrained(
            model,
            output_loading_info=True,
            num_labels=len(loaded),
            id2label=loaded,
            label2id={label: index for index, label in loaded.items()},
            problem_type=loss_of(spec),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a checkpoint that was fine-tuned for another number of labels
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(not_loaded("model", model, error)) from error
    if is_trained:
        check_all_loaded(model, loading)
    start_head(backbone, start, names)
    if lacks_pad_token(backbone):
        set_pad_token(backbone, load_tokenizer(model))
    return backbone


def check_all_loaded(folder: str | Path, loading: dict[str, Any]) -> None:
    """See that a run's folder had all weights of its model.

    Args:
        folder: of the run.
        loading: what ``from_pretrained`` says with ``output_loading_info``.

    Raises:
        UserError: one is missing, or has another shape.
    """
    mismatched = {key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]}
    if lost := sorted({*loading["missing_keys"], *mismatched}):
        raise UserError(_incomplete(folder, lost))


def _incomplete(folder: str | Path, lost: list[str]) -> str:
    return (
        f"The weights in {folder} are damaged: {first_of(lost, 2)} {'are' if lost[1:] else 'is'} missing or of another "
        "shape; copy the folder again, or train again with `overwrite`."
    )


def load_model_config(model: str, what: str = "model") -> PreTrainedConfig:
    """A backbone's config, without its weights; errors call the backbone ``what``.

    Raises:
        UserError: there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(not_loaded(what, model, error)) from error


def note_on_head(model: str, spec: TaskSpec) -> tuple[str, ...]:
    """What a reader of the results should know about the head that :func:`load_backbone` gives, if anything."""
    note = head_start(AutoConfig.from_pretrained(model).id2label or {}, spec.label_names).note
    return () if note is None else (f"{spec.name}: {note}",)


def lacks_pad_token(model: PreTrainedModel) -> bool:
    """Whether the model's config does not say which token is padding; decoders classify by the last that is not."""
    return getattr(model.config.get_text_config(), "pad_token_id", None) is None


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model that :func:`lacks_pad_token` its tokenizer's."""
    if lacks_pad_token(model):
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token.

    One that was set to pad on the left, as for generating, pads on the right again: models that count positions from
    the first token of a row would answer by how much padding is before a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        was_set = tokenizer.padding_side == "left" and type(tokenizer).padding_side == "right"
        if was_set and AutoConfig.from_pretrained(model).model_type not in _READ_THE_LAST_PLACE:
            tokenizer.padding_side = "right"
    except (OSError, ValueError) as error:
        raise UserError(not_loaded("tokenizer of the model", model, error)) from error
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that has no padding token pads with the one that ends a text from now on."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def extend(backbone: PreTrainedModel, method: str, spec: TaskSpec | None, settings: dict[str, Any]) -> Model:
    """The model to train: a backbone, dense or sparse, with the method's adapter and head, or all of it.

    A language model has no ``spec``, and its adapter no head.
    """
    config = adapter_config(method, settings, spec, task_type_of(spec))
    if config is None:
        return backbone
    if spec is not None and isinstance(config, (LoraConfig, IA3Config)) and config.modules_to_save is None:
        # PEFT would train `classifier` and `score` only, and forget a fresh pooler.
        config.modules_to_save = list(find_head(backbone, find_blocks(backbone)).modules)
    return attach(backbone, config, method)


def attach(backbone: PreTrainedModel, config: PeftConfig, method: str, adapter_name: str = "default") -> PeftModel:
    """A backbone, dense or sparse, with an adapter.

    Raises:
        UserError: the adapter does not fit the model, or acts on what a sparse model does not let it.
    """
    if isinstance(config, (LoraConfig, IA3Config)):
        choose_targets(config, backbone)
    try:
        extended = get_peft_model(backbone, config, adapter_name)
        if sparsification(backbone) is not None:  # a sparse FFN refuses in its first pass what cannot act inside it
            with torch.no_grad():
                extended(input_ids=torch.zeros(1, 2, dtype=torch.long, device=backbone.device))
    except ValueError as error:
        raise UserError(f"`method={method}` does not fit this model: {error}") from error
    return extended


@dataclass(frozen=True)
class TrainedRun:
    """What a run's model is loaded from.

    Attributes:
        folder: of the run.
        method: of the run.
        backbone: hub id or folder of the model that it was trained on; the run's own folder for full fine-tuning.
        is_sparse: it was trained on a sparse model.
        backbone_fingerprint: of the backbone that it was trained on, see :func:`fingerprint_of`.
        infer: answer as the ``"sparse"`` model or the ``"dense"`` one; None as in training.
    """

    folder: Path
    method: str
    backbone: str
    is_sparse: bool = False
    backbone_fingerprint: dict[str, Any] | None = None
    infer: str | None = None


def load_trained(run: TrainedRun, spec: TaskSpec) -> Model:
    """The trained model of a run, in eval mode.

    Raises:
        UserError: files are missing, truncated or foreign, or the backbone is another.
    """
    if run.method == "full":
        return load_backbone(run.backbone, spec, is_trained=True).eval()
    with loading_adapter(run.folder):
        backbone = load_backbone(run.backbone, spec)
    return attach_trained(backbone, run)


def attach_trained(backbone: PreTrainedModel, run: TrainedRun, exclude: Iterable[str] = ()) -> Model:
    """A run's adapter on its dense backbone, which is changed; in eval mode.

    Args:
        backbone: with as many labels as the run.
        exclude: modules of the head, which need not be as they were before training.

    Raises:
        UserError: files are missing, truncated or foreign, or the backbone is another.
    """
    with loading_adapter(run.folder):
        try:
            if run.backbone_fingerprint is not None:
                place = str(backbone.name_or_path)
                check_fingerprint(run.backbone_fingerprint, backbone, exclude, "of its training", place)
        except ValueError as error:
            raise UserError(
                f"`model={backbone.name_or_path}` is not the backbone that the adapter was trained on: its weights "
                "differ; pass the right one."
            ) from error
        load = partial(load_sparse, infer=run.infer) if run.is_sparse else PeftModel.from_pretrained
        model = load(backbone, str(run.folder)).eval()
        check_adapter_loaded(model, run.folder)
    return model


def check_adapter_loaded(model: PeftModel, folder: Path) -> None:
    """See that a folder has all weights of the adapter ``model`` read from it, of which PEFT only warns.

    Raises:
        UserError: one is missing.
    """
    if isinstance(model.active_peft_config, TaskAdapterConfig):
        return  # which check by themselves, and save some under other names
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    if lost := sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - saved):
        raise UserError(_incomplete(folder, lost))


def fingerprint_of(backbone: PreTrainedModel, method: str) -> dict[str, Any]:
    """What a run's ``run.json`` says of the backbone: nothing where the adapter's config does, or there is none."""
    config = _CONFIGS.get(method)
    if config is None or issubclass(config, TaskAdapterConfig):
        return {}
    return {"backbone_fingerprint": fingerprint(backbone)}


def to_accelerator(model: torch.nn.Module, device: str | None = None) -> None:
    """Move a model to the device of that name; None is where a trainer would: the accelerator, if there is one.

    Raises:
        UserError: there is no such device.
    """
    model.to(find_device(device))


@contextmanager
def loading_adapter(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while an adapter is loaded into a ``UserError`` that names its folder."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        if isinstance(error, KeyError):  # of PEFT, for what a sparse model adds
            reason = (
                f"{error} is missing, as of a model made sparse in another way or not at all; pass the dense backbone."
            )
        raise UserError(f"The adapter in {folder} could not be loaded: {reason}") from error


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Trained parameters: all, of the head (0 where the whole model is trained), and of the rest."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    head = count_head_parameters(model) if isinstance(model, PeftModel) else 0
    return {"trained": trained, "head": head, "adapter": trained - head}


def trained_head(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of the head of the task that is trained: the adapter's own, or the whole model's."""
    if isinstance(model, PeftModel):
        return head_parameters(model)
    modules = [model.get_submodule(name) for name in find_head(model, find_blocks(model)).modules]
    return [parameter for module in modules for parameter in module.parameters()]


def trained_norms(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of normalisation layers that are trained."""
    norms = (module for module in model.modules() if is_norm(module) and not list(module.children()))
    return [parameter for norm in norms for parameter in norm.parameters() if parameter.requires_grad]


def backbone_bytes(model: Model) -> int:
    """Bytes of the backbone's weights as they are in memory: what a full copy of the model takes."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = {id(parameter): parameter for _, parameter in backbone_parameters(bare)}  # tied ones once
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def not_loaded(what: str, model: str, error: Exception) -> str:
    """One sentence for a model or tokenizer that transformers did not load."""
    return (
        f"The {what} {model!r} could not be loaded ({first_line(error)}); pass the id of a model on the hub "
        "(which needs a network) or a local folder with config.json, safetensors and tokenizer files as `model`."
    )
