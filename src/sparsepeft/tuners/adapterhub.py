"""Reading adapters that AdapterHub's libraries (``adapters``, before it ``adapter-transformers``) saved."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsepeft.errors import UserError
from sparsepeft.models.blocks import Block, find_blocks
from sparsepeft.models.head_search import find_head
from sparsepeft.tuners.bottleneck import BottleneckConfig

_NAMED_CONFIGS = {"pfeiffer": "pfeiffer", "seq_bn": "pfeiffer", "houlsby": "houlsby", "double_seq_bn": "houlsby"}
_SEQ_BN = {"mh_adapter": False, "output_adapter": True, "original_ln_before": True}
_LAYOUTS = {"pfeiffer": _SEQ_BN, "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False}}
# Options of `adapters` without a counterpart here: key -> values that mean "not used", as does a missing key.
_FIXED: dict[str, tuple[Any, ...]] = {
    "original_ln_after": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "is_parallel": (False,),
    "scaling": (1, 1.0),
    "use_gating": (False,),
    "cross_adapter": (False,),
    "phm_layer": (False,),
    "stochastic_depth": (0, 0.0, None),
}
# Models where `adapters` 1.3.0 computes something else than its formulas, which are ours, say.
_ELSEWHERE = {
    ("albert", "houlsby"): "on the attention's input instead of its output",
    ("beit", "houlsby"): "behind the layer scale",
    ("xmod", "pfeiffer"): "in place of the model's language adapters",
    ("xmod", "houlsby"): "in place of the model's language adapters",
}
_DEFAULT_ACTIVATION = {"pfeiffer": "relu", "houlsby": "swish"}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_TENSOR = re.compile(
    r"(?P<place>.+)\.(?:adapters|(?:attention|layer)_text_(?:task|lang)_adapters)\.(?P<adapter>[^.]+)"
    r"\.adapter_(?P<linear>down\.0|up)\.(?P<kind>weight|bias)"
)
_POOLER = "bert.pooler"
# Where an adapter stands inside its layer: BERT's kin, most others, ALBERT, T5; ViT.
_ATTENTION_PLACES = ("attention.output", "attention_adapters", "attention.attention_adapters", "layer.0")
_FFN_PLACES = ("output", "output_adapters", "output.output_adapters", "layer.1", "layer.2")


def load_adapterhub(backbone: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Attach an adapter that AdapterHub's library saved: of kind ``seq_bn`` (Pfeiffer) or ``double_seq_bn`` (Houlsby).

    The result is a :class:`BottleneckConfig` adapter like any other: trainable, and saved by ``save_pretrained``. A
    classification head in the folder is loaded with it where it has the same layers as the backbone's. AdapterHub's
    files do not say which weights they were trained on, so pass the backbone that the adapter's page names.

    Args:
        backbone: the transformers model that the adapter was trained on.
        folder: where ``save_adapter`` wrote ``adapter_config.json`` and the weights.
        adapter_name: what to call the adapter here.

    Raises:
        UserError: files are missing or damaged, or belong to another model, or to a kind of adapter that
            :class:`BottleneckConfig` is not.
        ValueError: tensors are missing, unexpected, or of another shape.

    Example:
        >>> backbone = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base")  # doctest: +SKIP
        >>> model = load_adapterhub(backbone, "adapters/sst-2")  # doctest: +SKIP
        >>> model.save_pretrained("sst-2")  # doctest: +SKIP
    """
    folder = Path(folder)
    saved = _read_config(folder)
    _check_model(saved, backbone, folder)
    tensors = _read_tensors(folder, "adapter.safetensors", "pytorch_adapter.bin")
    if tensors is None:
        raise UserError(f"{folder} has neither adapter.safetensors nor pytorch_adapter.bin; copy the whole folder.")
    blocks = find_blocks(backbone)
    style, settings = _settings(saved, tensors, blocks)
    if (saved.get("model_type"), style) in _ELSEWHERE:
        place = _ELSEWHERE[saved["model_type"], style]
        raise _not_supported(f"a {style} layout that `adapters` computes {place} in {saved['model_type']} models")
    labels, head = _read_head(folder, backbone, blocks)
    config = BottleneckConfig(style=style, task_type=_task_type(backbone), **settings, **labels)
    model = get_peft_model(backbone, config, adapter_name=adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    loaded = _rename(tensors, saved.get("name"), style, blocks) | head
    # Where the folder has no head, the backbone's stays.
    state = {key: tensor for key, tensor in state.items() if ".bottleneck_" not in key}
    state |= {f"base_model.model.{key}": value for key, value in loaded.items()}
    try:
        set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    except ValueError:
        model.unload()  # leave the caller's backbone as it was
        raise
    return model


def _task_type(backbone: nn.Module) -> str | None:
    """PEFT's task type of the model; None if it does not take texts, which PEFT's classes pass on."""
    if getattr(backbone, "main_input_name", None) != "input_ids":
        return None
    return next((task for end, task in _TASK_TYPES.items() if type(backbone).__name__.endswith(end)), None)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        inside = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
        raise UserError(
            f"{folder} holds the adapters {', '.join(inside)} in folders of their own; pass one of these folders."
            if inside
            else f"{folder} has no adapter_config.json; pass a folder that adapters' save_adapter wrote."
        )
    saved = _read_json(path)
    if "peft_type" in saved:
        raise UserError(
            f"{path} is of PEFT's format (peft_type {saved['peft_type']!r}), not AdapterHub's; load {folder} with "
            "PeftModel.from_pretrained."
        )
    if not isinstance(saved.get("config"), (dict, str)):
        raise UserError(
            f"{path} has no adapter configuration under 'config'; pass a folder that adapters' save_adapter wrote."
        )
    return saved


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the folder again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not an object with keys; copy the folder again.")
    return content


def _read_tensors(folder: Path, safe_name: str, pickle_name: str) -> dict[str, Tensor] | None:
    """The tensors of whichever of the two files is there; None if neither is."""
    path = next((folder / name for name in (safe_name, pickle_name) if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        tensors = load_file(path) if path.name == safe_name else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or holds more than tensors ({first_line}); copy it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} holds something else than named tensors; copy it again.")
    return tensors


def _check_model(saved: dict[str, Any], backbone: nn.Module, folder: Path) -> None:
    config = getattr(backbone, "config", None)
    for key in ("model_type", "hidden_size"):
        expected, actual = saved.get(key), getattr(config, key, None)
        if expected is not None and expected != actual:
            raise UserError(
                f"The adapter in {folder} is for a model of {key} {expected!r}, but {type(backbone).__name__} has "
                f"{actual!r}; load the backbone that it was trained on ({saved.get('model_name') or 'not named'})."
            )


def _settings(saved: dict[str, Any], tensors: dict[str, Tensor], blocks: list[Block]) -> tuple[str, dict[str, Any]]:
    """Style and further arguments of our config.

    Raises:
        UserError: ours cannot say what the saved one says.
    """
    config = saved["config"]
    if isinstance(config, str):
        if config not in _NAMED_CONFIGS:
            raise _not_supported(f"config {config!r}")
        style = _NAMED_CONFIGS[config]
        return style, {"reduction_factor": 16, "non_linearity": _DEFAULT_ACTIVATION[style]}
    if config.get("architecture") is not None:
        raise _not_supported(f"architecture {config['architecture']!r}")
    for key, values in _FIXED.items():
        if key in config and config[key] not in values:
            raise _not_supported(f"{key}={config[key]!r}")
    layout = {key: config.get(key, False) for key in _SEQ_BN}
    style = next((style for style, known in _LAYOUTS.items() if known == layout), "")
    if not style:
        raise _not_supported(", ".join(f"{key}={value!r}" for key, value in layout.items()))
    if style == "pfeiffer" and config.get("residual_before_ln", True) is not True:
        raise _not_supported(f"residual_before_ln={config['residual_before_ln']!r}")
    # Old task adapters (their files have a "type") name an invertible adapter that they do not have.
    if any("invertible" in key for key in tensors) or (config.get("inv_adapter") and "type" not in saved):
        raise _not_supported(f"an invertible adapter, inv_adapter={config.get('inv_adapter')!r}")
    if config.get("dropout"):
        warnings.warn(
            f"The adapter was trained with dropout={config['dropout']}, which BottleneckConfig does not have: its "
            "answers are the same, but training it further will use none.",
            UserWarning,
            stacklevel=3,
        )
    activation = str(config.get("non_linearity", _DEFAULT_ACTIVATION[style])).lower()
    activation = "leaky_relu" if activation == "leakyrelu" else activation
    if "version" not in saved:
        activation = _OLD_ACTIVATIONS.get(activation, activation)
    settings = {"reduction_factor": _reduction(config.get("reduction_factor", 16)), "non_linearity": activation}
    return style, settings | _layers(config.get("leave_out") or [], blocks)


def _reduction(value: Any) -> float:
    if isinstance(value, dict):
        if len(set(value.values())) != 1:
            raise _not_supported(f"reduction_factor={value!r}, which differs between layers")
        value = next(iter(value.values()))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _not_supported(f"reduction_factor={value!r}")
    return value


def _layers(left_out: list[int], blocks: list[Block]) -> dict[str, Any]:
    """AdapterHub numbers a decoder's layers after the encoder's, we number each stack from 0."""
    kept = [block for number, block in enumerate(blocks) if number not in left_out]
    if len(kept) == len(blocks):
        return {}
    if not kept:
        raise UserError(f"leave_out={left_out} leaves no layer of {len(blocks)}; the adapter has nothing to load.")
    positions = {block.index for block in kept}
    if kept == [block for block in blocks if block.index in positions]:
        return {"layers_to_transform": sorted(positions)}
    return {"target_modules": [block.name for block in kept]}


def _not_supported(what: str) -> UserError:
    return UserError(
        f"The adapter has {what}, but load_adapterhub reads the layouts of AdapterHub's 'seq_bn' (pfeiffer) and "
        "'double_seq_bn' (houlsby); keep using this one with the `adapters` library, or train a BottleneckConfig anew."
    )


def _rename(tensors: dict[str, Tensor], adapter: str | None, style: str, blocks: list[Block]) -> dict[str, Tensor]:
    """AdapterHub's names -> those of our files; a name that is not understood stays, and is refused with the others."""
    ffn = "bottleneck_output" if style == "pfeiffer" else "bottleneck_ffn"
    containers = dict.fromkeys(_ATTENTION_PLACES, "bottleneck_attention") | dict.fromkeys(_FFN_PLACES, ffn)
    places = {
        f"{name}.{place}": f"{block.name}.{container}"
        for block in blocks
        for name in _peer_names(block.name)
        for place, container in containers.items()
    }
    renamed = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        place = None
        if match and match["adapter"] == adapter:
            place = places.get(match["place"]) or places.get(match["place"].partition(".")[2])
        name = f"{place}.{match['linear'].removesuffix('.0')}.{match['kind']}" if match and place else key
        renamed[name] = tensor
    return renamed


def _peer_names(name: str) -> set[str]:
    """What a layer may be called in a file that was saved from the bare backbone, or (ViT) with transformers 4."""
    names = {name, name.replace(".layers.", ".encoder.layer.")}
    return names | {each.partition(".")[2] for each in names}


def _read_head(folder: Path, backbone: nn.Module, blocks: list[Block]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our config's arguments and the tensors of the folder's head; both empty where there is none that fits."""
    tensors = _read_tensors(folder, "model_head.safetensors", "pytorch_model_head.bin")
    path = folder / "head_config.json"
    if tensors is None:
        return {}, {}
    saved = _read_json(path) if path.is_file() else {}
    flexible = saved.get("config") or {}
    if flexible:
        tensors = _rename_flexible_head(flexible, tensors, backbone)
    parameters = dict(backbone.named_parameters())
    modules = list(find_head(backbone, blocks).modules)
    if f"{_POOLER}.dense.weight" in tensors and _POOLER not in modules:
        modules.insert(0, _POOLER)
    label2id = flexible.get("label2id") or saved.get("label2id") or {}
    num_labels = flexible.get("num_labels") or saved.get("num_labels") or len(label2id)
    fits = bool(tensors and num_labels) and all(
        name in parameters
        and parameters[name].shape[1:] == tensor.shape[1:]
        and name.startswith(tuple(f"{module}." for module in modules))
        for name, tensor in tensors.items()
    )
    if not fits:
        kind = flexible.get("head_type") or saved.get("model_class", "of unknown kind")
        warnings.warn(
            f"The head in {folder} ({kind}) does not have the layers of {type(backbone).__name__}'s head, which "
            "stays as it is; train it, or load the model class that the head was made for.",
            UserWarning,
            stacklevel=3,
        )
        return {}, {}
    labels: dict[str, Any] = {"num_labels": num_labels, "head_modules": modules}
    if len(label2id) == num_labels:
        labels["id2label"] = {index: label for label, index in label2id.items()}
    return labels, tensors


def _rename_flexible_head(config: dict[str, Any], tensors: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """A head of AdapterHub's own model classes under the names of the backbone's head; empty where they differ."""
    layers, activation, pooled = (config.get(key) for key in ("layers", "activation_function", "use_pooler"))
    modules = dict(backbone.named_modules())
    names: list[str] = []
    if config.get("head_type") == "classification":
        if layers == 1 and pooled and _POOLER in modules:
            names = ["classifier"]
        elif layers == 2 and not pooled and activation == "tanh" and "classifier.out_proj" in modules:
            names = ["classifier.dense", "classifier.out_proj"]
        elif layers == 2 and not pooled and activation == "tanh" and _POOLER in modules:
            names = [f"{_POOLER}.dense", "classifier"]  # the pooler is such a layer, and becomes the adapter's own
        elif layers == 2 and not pooled and activation == "relu" and "pre_classifier" in modules:
            names = ["pre_classifier", "classifier"]
    # `heads.NAME.INDEX.weight`: a Sequential with dropouts and activations in between.
    indices = sorted({int(key.split(".")[2]) for key in tensors if re.fullmatch(r"heads\.[^.]+\.\d+\.\w+", key)})
    if len(names) != len(indices):
        return {}
    by_index = dict(zip(indices, names, strict=True))
    return {f"{by_index[int(key.split('.')[2])]}.{key.split('.')[3]}": tensor for key, tensor in tensors.items()}
