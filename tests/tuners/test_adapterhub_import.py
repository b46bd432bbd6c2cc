"""AdapterHub's checkpoints, written here as `adapters` 1.3.0 does; the benchmark `adapters` reads real ones."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tests.models import ARCHITECTURES, D, L, build, run

from sparsepeft.errors import UserError
from sparsepeft.tuners.adapterhub import load_adapterhub

SEQ_BN: dict[str, Any] = {
    "cross_adapter": False,
    "dropout": 0.0,
    "init_weights": "bert",
    "inv_adapter": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_dim": 4,
    "phm_layer": False,
    "reduction_factor": 8,
    "residual_before_ln": True,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
DOUBLE_SEQ_BN = SEQ_BN | {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
WIDTH = D // 8
BERT_PLACES = ("attention.output.adapters", "output.adapters")
OTHER_PLACES = ("attention_adapters.adapters", "output_adapters.adapters")


def layer_names(prefix: str, start: int = 0) -> list[str]:
    return [f"{prefix}.{index}" for index in range(start, start + L)]


# Layers, and the attention's and the FFN's place in them, in the names that `adapters` gives them.
PEERS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "bert": (layer_names("bert.encoder.layer"), BERT_PLACES),
    "roberta": (layer_names("roberta.encoder.layer"), BERT_PLACES),
    "electra": (layer_names("electra.encoder.layer"), BERT_PLACES),
    "deberta-v2": (layer_names("deberta.encoder.layer"), BERT_PLACES),
    "distilbert": (layer_names("distilbert.transformer.layer"), OTHER_PLACES),
    "albert": (
        ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
        ("attention.attention_adapters.adapters", "output_adapters.adapters"),
    ),
    "gpt2": (layer_names("transformer.h"), OTHER_PLACES),
    "llama": (layer_names("model.layers"), OTHER_PLACES),
    "bart": (layer_names("model.encoder.layers") + layer_names("model.decoder.layers"), OTHER_PLACES),
    "vit": (layer_names("vit.encoder.layer"), ("attention_adapters.adapters", "output.output_adapters.adapters")),
    "t5": (layer_names("encoder.block") + layer_names("decoder.block"), ("layer.0.adapters", "layer.1.adapters")),
}


def adapter_tensors(layers: list[str], places: tuple[str, ...], name: str = "sst") -> dict[str, torch.Tensor]:
    shapes = {
        "adapter_down.0.weight": (WIDTH, D),
        "adapter_down.0.bias": (WIDTH,),
        "adapter_up.weight": (D, WIDTH),
        "adapter_up.bias": (D,),
    }
    tensors = {}
    for layer in layers:
        for place in places:
            if layer.startswith("decoder.block") and place == "layer.1.adapters":
                place = "layer.2.adapters"  # T5's decoder has cross-attention in between
            tensors |= {f"{layer}.{place}.{name}.{key}": torch.randn(shape) * 0.3 for key, shape in shapes.items()}
    return tensors


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict | str = SEQ_BN, safe: bool = False, **saved: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"config": config, "hidden_size": D, "model_class": "BertForSequenceClassification", "model_name": ""}
    content |= {"model_type": "bert", "name": "sst", "version": "adapters.1.3.0"} | saved
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True))
    if safe:
        save_file(tensors, folder / "adapter.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def write_head(folder: Path, tensors: dict[str, torch.Tensor], **saved: Any) -> None:
    (folder / "head_config.json").write_text(json.dumps({"config": None, "hidden_size": D, "name": None} | saved))
    torch.save(tensors, folder / "pytorch_model_head.bin")


def bert_folder(tmp_path: Path, config: dict | str = SEQ_BN, **saved: Any) -> Path:
    places = BERT_PLACES if isinstance(config, dict) and config["mh_adapter"] else BERT_PLACES[1:]
    return write_adapter(tmp_path / "peer", adapter_tensors(PEERS["bert"][0], places), config, **saved)


def check_values(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """The adapter has the file's tensors: both number layers first and places second, so the order is the same."""
    values = [p for name, p in model.named_parameters() if ".bottleneck_" in name]
    assert len(values) == len(tensors)
    for value, expected in zip(values, tensors.values(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("style", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("name", PEERS)
def test_every_tensor_arrives_in_its_place(name: str, style: str, tmp_path: Path) -> None:
    if (name, style) == ("albert", "houlsby"):
        pytest.skip("refused, see test_models_where_adapters_computes_something_else")
    layers, places = PEERS[name]
    config = SEQ_BN if style == "pfeiffer" else DOUBLE_SEQ_BN
    tensors = adapter_tensors(layers, places[1:] if style == "pfeiffer" else places)
    backbone = build(name)
    inputs = ARCHITECTURES[name].inputs()
    bare = run(backbone, inputs)
    folder = write_adapter(
        tmp_path / "peer", tensors, config, name in ("bert", "t5"), model_type=backbone.config.model_type
    )
    model = load_adapterhub(backbone, folder).eval()
    assert model.peft_config["default"].style == style
    check_values(model, tensors)
    adapted = run(model, inputs)
    assert not torch.allclose(adapted, bare, atol=1e-3)

    model.save_pretrained(str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(build(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(run(again, inputs), adapted, rtol=0, atol=0)


@pytest.mark.parametrize("saved_prefix", ["bert.", ""])
def test_saved_with_and_without_a_head_around_the_backbone(saved_prefix: str, tmp_path: Path) -> None:
    layers = [saved_prefix + name.removeprefix("bert.") for name in PEERS["bert"][0]]
    tensors = adapter_tensors(layers, BERT_PLACES[1:])
    folder = write_adapter(tmp_path / "peer", tensors)
    for backbone in (build("bert"), build("bert").bert):
        check_values(load_adapterhub(backbone, folder), tensors)


@pytest.mark.parametrize(("kind", "style"), [("pfeiffer", "pfeiffer"), ("houlsby", "houlsby"), ("seq_bn", "pfeiffer")])
def test_old_files_with_a_named_config(kind: str, style: str, tmp_path: Path) -> None:
    places = ("attention.output.attention_text_task_adapters", "output.layer_text_task_adapters")
    tensors = adapter_tensors(PEERS["bert"][0], places if style == "houlsby" else places[1:])
    tensors = {key: tensor[:2] if "down" in key else tensor[..., :2] for key, tensor in tensors.items()}  # 32 // 16
    tensors = {key: torch.randn(D) if key.endswith("up.bias") else tensor for key, tensor in tensors.items()}
    folder = write_adapter(tmp_path / "peer", tensors, kind, version=..., type="text_task")
    model = load_adapterhub(build("bert"), folder)
    assert model.peft_config["default"].style == style
    assert model.peft_config["default"].reduction_factor == 16
    check_values(model, tensors)


NEW = "adapters.1.3.0"


@pytest.mark.parametrize(
    ("change", "version", "expected"),
    [
        ({"non_linearity": "gelu"}, NEW, {"non_linearity": "gelu"}),
        ({"non_linearity": "gelu"}, ..., {"non_linearity": "gelu_new"}),
        ({"non_linearity": "gelu_orig"}, ..., {"non_linearity": "gelu"}),
        ({"non_linearity": "LeakyReLU"}, NEW, {"non_linearity": "leaky_relu"}),
        ({"non_linearity": "swish"}, ..., {"non_linearity": "swish"}),
        ({"reduction_factor": {"0": 8, "default": 8}}, NEW, {"reduction_factor": 8}),
        ({"inv_adapter": "nice"}, ..., {"reduction_factor": 8}),  # which an old task adapter only names
    ],
)
def test_settings_are_read_from_the_config(change: dict, version: Any, expected: dict, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path, SEQ_BN | change, version=version, type="text_task" if version is ... else ...)
    model = load_adapterhub(build("bert"), folder, adapter_name="film")
    assert list(model.peft_config) == ["film"]
    assert {name: getattr(model.peft_config["film"], name) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("bert", [1]), ("bart", [0, 1, 2]), ("bart", [1, 4]), ("bart", [0, 5])],
    ids=["one stack", "encoder", "same in both", "different"],
)
def test_layers_left_out_of_an_encoder_decoder_are_counted_through(
    name: str, left_out: list[int], tmp_path: Path
) -> None:
    all_layers, places = PEERS[name]
    layers = [layer for index, layer in enumerate(all_layers) if index not in left_out]
    tensors = adapter_tensors(layers, places[1:])
    folder = write_adapter(tmp_path / "peer", tensors, SEQ_BN | {"leave_out": left_out}, model_type=name)
    model = load_adapterhub(build(name), folder).eval()
    check_values(model, tensors)
    if left_out in ([1], [1, 4]):
        assert model.peft_config["default"].layers_to_transform == [0, 2]
    model.save_pretrained(str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(build(name), str(tmp_path / "ours")).eval()
    inputs = ARCHITECTURES[name].inputs()
    torch.testing.assert_close(run(again, inputs), run(model, inputs), rtol=0, atol=0)


def test_dropout_is_said_to_be_lost(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path, SEQ_BN | {"dropout": 0.1})
    with pytest.warns(UserWarning, match=r"dropout=0\.1"):
        load_adapterhub(build("bert"), folder)


# -- heads -----------------------------------------------------------------------------------------------------------

LABELS = {"bad": 0, "good": 1, "unsure": 2}


def classification(**changes: Any) -> dict[str, Any]:
    head = {"activation_function": "tanh", "bias": True, "dropout_prob": None, "head_type": "classification"}
    return head | {"label2id": LABELS, "layers": 2, "num_labels": 3, "use_pooler": False} | changes


def dense(name: str, outputs: int = D) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, D), f"{name}.bias": torch.randn(outputs)}


HEADS = {
    # model, head's config, names in the file, the same names in the backbone
    "roberta, its own": ("roberta", None, ("classifier.dense", "classifier.out_proj")),
    "roberta, flexible": ("roberta", classification(), ("heads.sst.1", "heads.sst.4")),
    "bert, its own": ("bert", None, ("classifier",)),
    "bert, flexible with pooler": ("bert", classification(layers=1, use_pooler=True), ("heads.sst.1",)),
    "bert, flexible": ("bert", classification(), ("heads.sst.1", "heads.sst.4")),
    "distilbert, flexible": ("distilbert", classification(activation_function="relu"), ("heads.sst.1", "heads.sst.4")),
}


@pytest.mark.parametrize("case", HEADS)
def test_classification_heads(case: str, tmp_path: Path) -> None:
    name, config, names = HEADS[case]
    layers, places = PEERS[name]
    folder = write_adapter(tmp_path / "peer", adapter_tensors(layers, places[1:]), model_type=name)
    head = {key: tensor for each in names[:-1] for key, tensor in dense(each).items()} | dense(names[-1], 3)
    write_head(folder, head, config=config, label2id=LABELS, num_labels=3)
    seen = {}
    backbone = build(name)
    backbone.base_model.register_forward_hook(lambda m, args, output: seen.update(output))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_adapterhub(backbone, folder).eval()
    assert model.config.id2label == {0: "bad", 1: "good", 2: "unsure"}
    inputs = ARCHITECTURES[name].inputs()
    logits = run(model, inputs)

    with torch.no_grad():
        states = seen["last_hidden_state"][:, 0]
        if len(names) == 1:
            states = seen["pooler_output"]
        else:
            activation = torch.relu if name == "distilbert" else torch.tanh
            states = activation(
                torch.nn.functional.linear(states, *(head[f"{names[0]}.{k}"] for k in ("weight", "bias")))
            )
        expected = torch.nn.functional.linear(states, *(head[f"{names[-1]}.{k}"] for k in ("weight", "bias")))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # float32 rounding

    model.save_pretrained(str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(build(name), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(run(again, inputs), logits, rtol=0, atol=0)
    assert again.config.id2label == {0: "bad", 1: "good", 2: "unsure"}


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (classification(head_type="masked_lm"), dense("heads.sst.1")),
        (classification(layers=3), dense("heads.sst.1") | dense("heads.sst.4") | dense("heads.sst.7", 3)),
        (classification(activation_function="relu"), dense("heads.sst.1") | dense("heads.sst.4", 3)),
        (None, dense("cls.predictions.decoder", 99)),
        (None, {"classifier.weight": torch.randn(3, D + 1), "classifier.bias": torch.randn(3)}),
        (classification(), {"elsewhere.weight": torch.randn(3, D)}),
    ],
)
def test_foreign_head_leaves_the_backbones_own(
    config: dict | None, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = bert_folder(tmp_path)
    write_head(folder, tensors, config=config, label2id=LABELS, num_labels=3, model_class="BertForSomething")
    backbone = build("bert")
    own = backbone.classifier.weight.detach().clone()
    with pytest.warns(UserWarning, match="stays as it is"):
        model = load_adapterhub(backbone, folder)
    assert torch.equal(model.base_model.model.classifier.weight, own)
    assert model.config.num_labels == 2


def test_a_head_for_a_backbone_without_one_is_left_out(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    write_head(folder, dense("classifier", 3), label2id=LABELS, num_labels=3)
    with pytest.warns(UserWarning, match="stays as it is"):
        load_adapterhub(build("bert").bert, folder)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mh_adapter": True}, "mh_adapter=True"),
        ({"output_adapter": False, "mh_adapter": True}, "output_adapter=False"),
        ({"original_ln_before": False}, "original_ln_before=False"),
        ({"original_ln_after": False}, "original_ln_after=False"),
        ({"ln_before": True}, "ln_before=True"),
        ({"ln_after": True}, "ln_after=True"),
        ({"is_parallel": True}, "is_parallel=True"),
        ({"scaling": 4.0}, r"scaling=4\.0"),
        ({"scaling": "learned"}, "scaling='learned'"),
        ({"use_gating": True}, "use_gating=True"),
        ({"cross_adapter": True}, "cross_adapter=True"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
        ({"stochastic_depth": 0.1}, r"stochastic_depth=0\.1"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice'"),
        ({"reduction_factor": {"0": 8, "default": 16}}, "differs between layers"),
        ({"reduction_factor": "16"}, "reduction_factor='16'"),
        ({"architecture": "lora"}, "architecture 'lora'"),
        ({"architecture": "union", "configs": []}, "architecture 'union'"),
        ("compacter", "config 'compacter'"),
        ("pfeiffer+inv", r"config 'pfeiffer\+inv'"),
    ],
)
def test_other_kinds_are_refused_by_name(change: dict[str, Any] | str, named: str, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path, change if isinstance(change, str) else SEQ_BN | change)
    with pytest.raises(UserError, match=rf"{named}.*but load_adapterhub reads.*keep using"):
        load_adapterhub(build("bert"), folder)


@pytest.mark.parametrize("model_type", ["albert", "beit", "xmod"])
def test_models_where_adapters_computes_something_else(model_type: str, tmp_path: Path) -> None:
    backbone = build("bert")
    backbone.config.model_type = model_type
    folder = bert_folder(tmp_path, DOUBLE_SEQ_BN, model_type=model_type)
    with pytest.raises(UserError, match=f"computes .* in {model_type} models, but load_adapterhub reads"):
        load_adapterhub(backbone, folder)


def torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pytorch_adapter.bin", torch_saved({"a": torch.zeros(99)})[:200], r"pytorch_adapter\.bin is damaged"),
        ("pytorch_adapter.bin", pickle.dumps({"a": print}), r"pytorch_adapter\.bin is damaged or holds more than ten"),
        ("pytorch_adapter.bin", torch_saved([torch.zeros(1)]), "something else than named tensors"),
        ("adapter.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", r"adapter\.safetensors is damaged"),
        ("adapter_config.json", b'{"config": {', "not valid JSON"),
        ("adapter_config.json", b"[]", "holds list"),
        ("pytorch_adapter.bin", None, r"neither adapter\.safetensors nor pytorch_adapter\.bin"),
        ("adapter_config.json", None, r"no adapter_config\.json"),
        ("adapter_config.json", b'{"peft_type": "LORA"}', r"PeftModel\.from_pretrained"),
        ("adapter_config.json", b'{"name": "sst"}', "no adapter configuration under 'config'"),
        ("pytorch_model_head.bin", b"", r"pytorch_model_head\.bin is damaged"),
    ],
)
def test_damaged_folders(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path)
    write_head(folder, dense("classifier", 3), label2id=LABELS, num_labels=3)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_adapterhub(build("bert"), folder)


def test_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    for name in ("sst", "rte"):
        write_adapter(tmp_path / name, {}, SEQ_BN)
    with pytest.raises(UserError, match="holds the adapters rte, sst in folders of their own"):
        load_adapterhub(build("bert"), tmp_path)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"model_type": "roberta"}, "of model_type 'roberta', but BertForSequenceClassification has"),
        ({"hidden_size": 768}, "of hidden_size 768, but BertForSequenceClassification has"),
        ({"config": SEQ_BN | {"leave_out": [0, 1, 2]}}, "leaves no layer"),
    ],
)
def test_another_backbone_and_no_layer_are_refused(saved: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_adapterhub(build("bert"), bert_folder(tmp_path, **saved))


UP_BIAS = f"{PEERS['bert'][0][1]}.output.adapters.sst.adapter_up.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({UP_BIAS: None}, "missing: bert.encoder.layer.1.bottleneck_output.up.bias"),
        ({"bert.invertible_adapters.sst.F.0.weight": torch.zeros(2)}, "an invertible adapter"),
        (
            adapter_tensors(PEERS["bert"][0][:1], BERT_PLACES[1:], name="rte"),
            "unexpected: bert.encoder.layer.0.output.adapters.rte.adapter_down.0.bias",
        ),
        (
            {UP_BIAS: torch.zeros(D + 1)},
            r"another shape: bert.encoder.layer.1.bottleneck_output.up.bias \[33\] instead of \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_leave_the_backbone_alone(change: dict, said: str, tmp_path: Path) -> None:
    tensors = adapter_tensors(PEERS["bert"][0], BERT_PLACES[1:]) | change
    folder = write_adapter(tmp_path / "peer", {key: value for key, value in tensors.items() if value is not None})
    backbone = build("bert")
    inputs = ARCHITECTURES["bert"].inputs()
    before, names = run(backbone, inputs), [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match=said):
        load_adapterhub(backbone, folder)
    torch.testing.assert_close(run(backbone, inputs), before, rtol=0, atol=0)
    assert [name for name, _ in backbone.named_modules()] == names
