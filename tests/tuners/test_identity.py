"""A saved adapter knows its backbone and refuses another."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, SMALL, adapted, build, randomize, run, save_backbone

from sparsepeft import SpartanConfig
from sparsepeft.models import identity
from sparsepeft.models.identity import check_fingerprint, fingerprint

INPUTS = ARCHITECTURES["bert"].inputs()
CLS = hf.BertForSequenceClassification


@pytest.fixture
def saved(tmp_path):
    """A backbone's folder and the folder of an adapter trained on it."""
    backbone = save_backbone("bert", tmp_path / "backbone")
    model = get_peft_model(CLS.from_pretrained(backbone), SpartanConfig(**SMALL), revision="abc123")
    randomize(model)
    model.eval().save_pretrained(tmp_path / "task")
    return backbone, tmp_path / "task"


def _attach(folder: str, task, **options) -> PeftModel:
    return PeftModel.from_pretrained(CLS.from_pretrained(folder, **options), task)


def _other(folder, seed: int = 9, **config) -> str:
    torch.manual_seed(seed)
    settings = build("bert").config.to_dict() | config
    return save_backbone(CLS(hf.BertConfig.from_dict(settings)), folder)


def test_the_file_records_format_backbone_revision_and_fingerprint(saved) -> None:
    backbone, task = saved
    config = json.loads((task / "adapter_config.json").read_text())
    assert config["format_version"] == 1
    assert config["base_model_name_or_path"] == backbone
    assert config["revision"] == "abc123"
    fingerprint = config["backbone_fingerprint"]
    assert len(fingerprint["tensors"]) >= 8
    assert not any("classifier" in name for name in fingerprint["tensors"])
    assert (task / "adapter_config.json").stat().st_size < 20_000
    # Else the revision is the hub's commit.
    model = build("bert")
    model.config._commit_hash = "0123abc"
    assert get_peft_model(model, SpartanConfig(**SMALL)).peft_config["default"].revision == "0123abc"


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "transformers"])
def test_another_backbone_is_refused_by_both_names(saved, tmp_path, how: str) -> None:
    backbone, task = saved
    other = CLS.from_pretrained(_other(tmp_path / "other")).eval()
    expected = run(other, INPUTS)
    attach = {
        "from_pretrained": lambda: PeftModel.from_pretrained(other, task),
        "load_adapter": lambda: get_peft_model(other, SpartanConfig(**SMALL)).load_adapter(str(task), "task"),
        "transformers": lambda: other.load_adapter(str(task)),
    }
    with pytest.raises(ValueError, match="check_backbone=False") as error:
        attach[how]()
    assert backbone in str(error.value)
    assert "abc123" in str(error.value)
    assert str(tmp_path / "other") in str(error.value)
    if how != "load_adapter":  # nothing was attached
        assert torch.equal(run(other, INPUTS), expected)
        assert not any("spartan" in name for name, _ in other.named_modules())


@pytest.mark.parametrize("config", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"vocab_size": 50}])
def test_a_backbone_of_another_shape_is_refused(saved, tmp_path, config: dict) -> None:
    _, task = saved
    with pytest.raises(ValueError, match="backbone"):
        _attach(_other(tmp_path / "other", **config), task)


def test_the_override_attaches_anyway(saved, tmp_path) -> None:
    _, task = saved
    other = CLS.from_pretrained(_other(tmp_path / "other")).eval()
    config = SpartanConfig.from_pretrained(task)
    config.check_backbone = False
    loaded = PeftModel.from_pretrained(other, task, config=config)
    assert run(loaded, INPUTS).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_backbone_is_known_in_another_dtype(saved, tmp_path, dtype: torch.dtype) -> None:
    backbone, task = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _attach(backbone, task, dtype=dtype)
        model = get_peft_model(CLS.from_pretrained(backbone, dtype=dtype), SpartanConfig(**SMALL))
        model.save_pretrained(tmp_path / "other dtype")
        _attach(backbone, tmp_path / "other dtype", dtype=torch.float32)
    with pytest.raises(ValueError, match="backbone"):
        _attach(_other(tmp_path / "other"), task, dtype=dtype)


def test_another_class_of_the_same_checkpoint_passes_if_the_head_fits(tmp_path) -> None:
    torch.manual_seed(0)
    folder = save_backbone(hf.RobertaForMaskedLM(build("roberta").config), tmp_path / "backbone")
    encoder = get_peft_model(hf.RobertaModel.from_pretrained(folder, add_pooling_layer=False), SpartanConfig(**SMALL))
    encoder.save_pretrained(tmp_path / "task")
    again = hf.RobertaModel.from_pretrained(folder, add_pooling_layer=False)
    PeftModel.from_pretrained(again, tmp_path / "task")
    fingerprints = [
        get_peft_model(cls.from_pretrained(folder), SpartanConfig(**SMALL)).peft_config["default"].backbone_fingerprint
        for cls in (hf.RobertaForSequenceClassification, hf.RobertaForTokenClassification)
    ]
    assert fingerprints[0] == fingerprints[1]


def test_training_other_heads_or_adapters_does_not_change_the_identity(saved) -> None:
    backbone, task = saved
    model = get_peft_model(CLS.from_pretrained(backbone), SpartanConfig(**SMALL, train_layer_norms=True), "mine")
    randomize(model, "mine")
    model.load_adapter(str(task), "task")
    assert set(model.peft_config) == {"mine", "task"}


def test_a_changed_backbone_is_noticed(saved) -> None:
    backbone, task = saved
    model = CLS.from_pretrained(backbone)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ValueError, match="other values"):
        PeftModel.from_pretrained(model, task)


def test_a_newer_format_is_refused(saved) -> None:
    backbone, task = saved
    path = task / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="upgrade sparsepeft"):
        _attach(backbone, task)


def test_an_adapter_of_a_model_that_was_never_saved_is_checked_too(tmp_path) -> None:
    adapted("bert").save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("bert"), tmp_path)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        PeftModel.from_pretrained(ARCHITECTURES["bert"].build(), tmp_path)


def test_a_tensor_of_more_than_2_to_the_24_values_is_sampled_to_its_end() -> None:
    def model(last: float) -> torch.nn.Module:
        made = torch.nn.Linear(2**13, 2**11 + 4, bias=False, dtype=torch.bfloat16)  # float32 rounds its last index up
        torch.nn.init.zeros_(made.weight)
        made.weight.data[-1, -1] = last
        return made

    found = fingerprint(model(0.0))
    check_fingerprint(found, model(0.0), (), "a", "a")
    with pytest.raises(ValueError, match="other values"):
        check_fingerprint(found, model(1.0), (), "a", "b")
    # Of smaller tensors fingerprints are those of saved adapters.
    module = torch.nn.Linear(1000, 100, bias=False)
    module.weight.data = torch.arange(100_000.0).reshape(100, 1000)
    values = fingerprint(module)["tensors"]["weight"]["values"]
    assert values == [0.0, 14285.0, 28571.0, 42856.0, 57142.0, 71427.0, 85713.0, 99999.0]


def test_partitioned_parameters_are_gathered(monkeypatch) -> None:
    """DeepSpeed is not installed here: a stand-in that empties parameters and fills them as ZeRO-3 does."""
    model = build("bert")
    expected = fingerprint(model)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.whole = parameter.shape, parameter.data
        parameter.data = torch.empty(0)

    @contextmanager
    def gather(parameters, modifier_rank=0):
        for parameter in parameters:
            parameter.data = parameter.whole
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setattr(identity, "gather_params_ctx", gather)
    assert fingerprint(model) == expected
    check_fingerprint(expected, model, (), "a", "a")
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_checking_a_model_of_125_million_parameters_takes_under_a_second() -> None:
    with torch.device("meta"):
        model = hf.RobertaModel(hf.RobertaConfig())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert sum(p.numel() for p in model.parameters()) > 120e6
    start = time.perf_counter()
    check_fingerprint(fingerprint(model), model, (), "a", "b")
    assert time.perf_counter() - start < 1.0
