"""Every task has a head of its own: its size, its labels, its loss, its fresh layers."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from tests.models import ARCHITECTURES, METHODS, SMALL, adapted, add, answers, build, randomize, run, save_backbone

from sparsepeft import HeadConfig, SpartanConfig

INPUTS = ARCHITECTURES["bert"].inputs()
LABELS = torch.tensor([1, 0, 1])
TASK_METHODS = METHODS | {"head": HeadConfig}
TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def _many_heads(name: str = "bert") -> PeftModel:
    """Tasks with two, five and three labels and one of regression on one backbone."""
    model = adapted(name, "two")
    add(model, "five", num_labels=5, id2label={i: f"class{i}" for i in range(5)})
    add(model, "degree", num_labels=1, problem_type="regression")
    add(model, "small", num_labels=3, head_type="linear")
    return model


@pytest.mark.parametrize("name", ["roberta", "modernbert", "llama-seqcls", "vit"])
def test_tasks_with_other_label_counts_share_a_backbone_and_are_saved_apart(name: str, tmp_path) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = _many_heads(name)
    model.save_pretrained(tmp_path)
    for adapter, width in {"two": 2, "five": 5, "degree": 1, "small": 3}.items():
        model.set_adapter(adapter)
        expected = run(model, inputs)
        assert expected.shape == (3, width)
        alone = PeftModel.from_pretrained(build(name), tmp_path / adapter)
        assert torch.equal(run(alone, inputs), expected)
        assert alone.config.num_labels == width
        assert alone.config.id2label == model.config.id2label


def test_the_config_follows_the_active_adapter() -> None:
    model = _many_heads()
    bare = (2, {0: "LABEL_0", 1: "LABEL_1"}, None)
    five = (5, {i: f"class{i}" for i in range(5)}, None)

    def labels() -> tuple:
        return model.config.num_labels, model.config.id2label, model.config.problem_type

    assert labels() == bare
    model.set_adapter("five")
    assert labels() == five
    assert model.config.label2id == {f"class{i}": i for i in range(5)}
    assert model.base_model.model.num_labels == 5
    with model.disable_adapter():
        assert labels() == bare
        assert model.base_model.model.num_labels == 2
    assert labels() == five
    model.set_adapter("degree")
    assert labels() == (1, {0: "LABEL_0"}, "regression")
    with pytest.warns(UserWarning, match="'two' is active"):
        model.delete_adapter("degree")
    assert labels() == bare
    model.set_adapter("five")
    backbone = model.unload()
    assert (backbone.config.num_labels, backbone.num_labels) == (2, 2)


def test_switching_while_adapters_are_off_takes_effect_when_they_come_back() -> None:
    model = _many_heads()
    with model.disable_adapter():
        model.set_adapter("five")
        assert model.config.num_labels == 2
        assert torch.equal(run(model, INPUTS), run(build("bert"), INPUTS))
    assert model.config.num_labels == 5
    assert run(model, INPUTS).shape == (3, 5)


def test_the_loss_is_the_active_tasks() -> None:
    model = _many_heads()
    for adapter, labels in {"two": LABELS, "five": torch.tensor([4, 0, 3])}.items():
        model.set_adapter(adapter)
        output = model(**INPUTS, labels=labels)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
        assert model.config.problem_type == "single_label_classification"
    model.set_adapter("degree")
    targets = torch.tensor([0.5, 2.0, -1.0])
    output = model(**INPUTS, labels=targets)
    torch.testing.assert_close(output.loss, torch.nn.functional.mse_loss(output.logits.squeeze(), targets))
    # transformers writes the problem type it has decided on into the config: a task's must not stick to another.
    add(model, "multi", num_labels=4, problem_type="multi_label_classification")
    model.set_adapter("multi")
    many = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]])
    output = model(**INPUTS, labels=many)
    torch.testing.assert_close(output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, many))
    with model.disable_adapter():
        assert model(**INPUTS, labels=LABELS).logits.shape == (3, 2)


def test_a_small_head_is_one_linear_layer_on_what_the_models_head_receives() -> None:
    model = adapted("roberta", head_type="linear", num_labels=3)
    trained = {
        n.partition("modules_to_save.default.")[2]: p for n, p in model.named_parameters() if "modules_to_save" in n
    }
    assert {n: tuple(p.shape) for n, p in trained.items()} == {"out_proj.weight": (3, 32), "out_proj.bias": (3,)}
    states = model.base_model.model.roberta(**INPUTS).last_hidden_state[:, 0]
    expected = torch.nn.functional.linear(states, trained["out_proj.weight"], trained["out_proj.bias"])
    torch.testing.assert_close(run(model, INPUTS), expected)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper-audiocls", "distilbert"])
def test_a_small_head_reads_what_the_model_pools(name: str, tmp_path) -> None:
    """Audio classifiers project their states and average them; DistilBERT takes the first token before its head."""
    inputs = ARCHITECTURES[name].inputs()
    if name == "wav2vec2":
        inputs["attention_mask"] = torch.ones(3, 100, dtype=torch.long)
        inputs["attention_mask"][1, 60:] = 0  # padding is not averaged
    model = adapted(name, head_type="linear", num_labels=3, layers_to_transform=[0])
    backbone = model.base_model.model
    linear = backbone.classifier.modules_to_save["default"].out_proj
    kept = {}
    first = backbone.get_submodule(model.peft_config["default"].head_modules[0])
    handle = first.register_forward_pre_hook(lambda _, args: kept.update(states=args[0]))
    found = run(model, inputs)
    handle.remove()
    states = kept["states"]
    if name == "wav2vec2":
        mask = backbone._get_feature_vector_attention_mask(states.shape[1], inputs["attention_mask"])
        assert not mask.all()
        states = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    elif states.dim() == 3:
        states = states.mean(1)
    torch.testing.assert_close(found, linear(states), rtol=1e-4, atol=1e-5)
    add(model, "other", head_type="linear", num_labels=2)
    add(model, "whole")
    alone = answers(model, inputs, "default", "other", "whole")
    names = ["other", "default", "whole"]
    mixed = run(model, inputs, adapter_names=names)
    for row, adapter in enumerate(names):
        answer = alone[adapter][row]
        torch.testing.assert_close(mixed[row, : len(answer)], answer, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = build(name)
    torch.nn.init.normal_(again.get_submodule(model.peft_config["default"].head_modules[0]).weight)
    assert torch.equal(run(PeftModel.from_pretrained(again, tmp_path / "other"), inputs), alone["other"])


@pytest.mark.parametrize("task_type", [None, "TOKEN_CLS"])
def test_a_small_head_of_a_class_for_tokens_labels_each_of_them(task_type: str | None) -> None:
    class Renamed(hf.ModernBertForTokenClassification):
        pass

    config = build("modernbert").config
    torch.manual_seed(0)
    settings = {**SMALL, "head_type": "linear", "num_labels": 3, "task_type": task_type}
    for cls in (hf.ModernBertForTokenClassification, Renamed):
        assert run(get_peft_model(cls(config), SpartanConfig(**settings)).eval(), INPUTS).shape == (3, 7, 3)


def test_a_small_head_on_a_model_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="head_type='model'"):
        adapted("llama", head_type="linear")
    with pytest.raises(ValueError, match="num_labels"):
        adapted("llama", num_labels=3)


@pytest.mark.parametrize("head_type", ["model", "linear"])
@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_heads_that_answer_for_every_position(kind: str, head_type: str, tmp_path) -> None:
    config = build("bert").config
    config.num_labels = 2
    backbone = getattr(hf, f"BertFor{kind}")
    torch.manual_seed(0)
    bare = backbone(config).eval()
    task_type = {"TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}[kind]

    def answer(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output = model(**INPUTS)
        return output.logits if kind == "TokenClassification" else torch.stack([output.start_logits, output.end_logits])

    expected = answer(bare)
    folder = save_backbone(bare, tmp_path / "backbone")
    model = get_peft_model(
        backbone.from_pretrained(folder), SpartanConfig(**SMALL, task_type=task_type, head_type=head_type)
    )
    if head_type == "model":
        assert torch.equal(answer(model.eval()), expected)
    randomize(model)
    model.eval().save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(backbone.from_pretrained(folder), tmp_path / "task")
    assert torch.equal(answer(loaded), answer(model))
    assert not torch.equal(answer(model), expected)
    assert type(loaded).__name__ == f"PeftModelFor{kind}"


def test_token_classification_mixes_tasks_in_a_batch() -> None:
    torch.manual_seed(0)
    model = get_peft_model(hf.BertForTokenClassification(build("bert").config), SpartanConfig(**SMALL), "tags").eval()
    randomize(model, "tags")
    add(model, "more", num_labels=6)
    mixed = run(model, INPUTS, adapter_names=["tags", "more", "tags"])
    assert mixed.shape == (3, 7, 6)
    assert torch.isinf(mixed[0, :, 2:]).all()
    assert torch.isfinite(mixed[1]).all()
    model.set_adapter("more")
    torch.testing.assert_close(mixed[1], run(model, INPUTS)[1], rtol=1e-4, atol=1e-5)


def _classifier(folder: str, seed: int, cls: type = hf.BertForSequenceClassification) -> torch.nn.Module:
    torch.manual_seed(seed)
    return cls.from_pretrained(folder).eval()


def test_a_pooler_that_was_not_in_the_checkpoint_belongs_to_the_head(tmp_path) -> None:
    torch.manual_seed(0)
    folder = save_backbone(hf.BertForMaskedLM(build("bert").config), tmp_path / "backbone")  # it has no pooler
    first, second = _classifier(folder, 1), _classifier(folder, 2)
    assert not torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    model = get_peft_model(first, SpartanConfig(**SMALL))
    assert model.peft_config["default"].head_modules == ["bert.pooler", "classifier"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = first.bert.pooler.modules_to_save["default"].dense.weight.clone()
    for _ in range(3):
        model(**INPUTS, labels=LABELS).loss.backward()
        optimizer.step()
    assert not torch.equal(first.bert.pooler.modules_to_save["default"].dense.weight, before)
    model.eval().save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(second, tmp_path / "task")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))
    # One from the checkpoint stays frozen.
    folder = save_backbone("bert", tmp_path / "whole")
    model = get_peft_model(_classifier(folder, 1), SpartanConfig(**SMALL))
    assert model.peft_config["default"].head_modules == ["classifier"]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("checkpoint", "head"), [("MaskedLM", ["bert.pooler", "classifier"]), ("", ["classifier"])])
def test_a_deep_copy_has_the_same_head(checkpoint: str, head: list[str], sharded: bool, tmp_path) -> None:
    torch.manual_seed(0)
    bare = getattr(hf, f"BertFor{checkpoint}" if checkpoint else "BertModel")(build("bert").config)
    bare.save_pretrained(tmp_path / "backbone", max_shard_size="20kB" if sharded else "1GB")
    original = _classifier(str(tmp_path / "backbone"), 1)
    model = adapted(copy.deepcopy(original))  # whose parameters do not say any more what was in the checkpoint
    assert model.peft_config["default"].head_modules == head
    assert get_peft_model(original, SpartanConfig(**SMALL)).peft_config["default"].head_modules == head
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(_classifier(str(tmp_path / "backbone"), 2), tmp_path / "task")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))


def test_a_pooler_of_which_nothing_is_known_is_part_of_the_fingerprint(tmp_path) -> None:
    first, second = build("bert"), build("bert")  # not from a checkpoint
    torch.nn.init.normal_(second.bert.pooler.dense.weight)
    adapted(first).save_pretrained(tmp_path)
    assert run(PeftModel.from_pretrained(build("bert"), tmp_path), INPUTS).shape == (3, 2)
    with pytest.raises(ValueError, match=r"'pooler\.dense\.weight' has other values"):
        PeftModel.from_pretrained(second, tmp_path)


@pytest.mark.parametrize(
    ("name", "family", "head"),
    [
        ("modernbert", "ModernBert", {"head", "classifier"}),
        ("deberta-v2", "DebertaV2", {"pooler", "classifier"}),
        ("roberta", "Roberta", {"classifier"}),
        ("albert", "Albert", {"albert.pooler", "classifier"}),
        ("distilbert", "DistilBert", {"pre_classifier", "classifier"}),
    ],
)
def test_heads_of_other_architectures_answer_alike_after_loading(tmp_path, name: str, family: str, head: set) -> None:
    masked_lm, classifier = (getattr(hf, f"{family}For{kind}") for kind in ("MaskedLM", "SequenceClassification"))
    torch.manual_seed(0)
    folder = save_backbone(masked_lm(build(name).config), tmp_path / "backbone")
    model = get_peft_model(_classifier(folder, 1, classifier), SpartanConfig(**SMALL))
    assert head <= set(model.peft_config["default"].head_modules)
    randomize(model)
    model.eval().save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(_classifier(folder, 2, classifier), tmp_path / "task")
    assert torch.equal(run(loaded, INPUTS), run(model, INPUTS))


@pytest.mark.parametrize(
    ("family", "kind"), [("XLMRoberta", "SequenceClassification"), ("Camembert", "QuestionAnswering")]
)
def test_a_head_registered_before_the_backbone_is_found(family: str, kind: str, tmp_path) -> None:
    cls = getattr(hf, f"{family}For{kind}")
    config = getattr(hf, f"{family}Config")(**{k: v for k, v in build("roberta").config.to_dict().items() if k in TEXT})
    bare = cls(config)
    head, backbone = (name for name, child in bare.named_children() if any(True for _ in child.parameters()))
    assert backbone == "roberta"  # or this test shows nothing
    folder = save_backbone(bare.roberta, tmp_path / "backbone")
    model = get_peft_model(cls.from_pretrained(folder), SpartanConfig(**SMALL, num_labels=2))
    assert model.peft_config["default"].head_modules == [head]
    assert any(head in n and p.requires_grad for n, p in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "task").eval()
    with torch.no_grad():
        expected, found = model(**INPUTS)[0], loaded(**INPUTS)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cls", [hf.LlamaForCausalLM, hf.BertForMaskedLM, hf.T5ForConditionalGeneration, hf.BertModel])
def test_what_scores_tokens_is_no_tasks_head(cls: type, tmp_path) -> None:
    """Not even where it is fresh; nor has a bare encoder one."""
    name = {"Llama": "llama", "Bert": "bert", "T5": "t5"}[cls.config_class.__name__.removesuffix("Config")]
    backbone = cls(build(name).config)
    with pytest.raises(ValueError, match=f"{cls.__name__} has none"):
        get_peft_model(backbone, HeadConfig())
    model = get_peft_model(cls(build(name).config), SpartanConfig(**SMALL))
    assert all("spartan_memory" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_backbones_loss_is_that_of_a_task_with_its_labels() -> None:
    backbone = build("bert")
    backbone.config.problem_type = "multi_label_classification"
    model = adapted(backbone, "same")
    add(model, "other", num_labels=5)
    assert [config.problem_type for config in model.peft_config.values()] == ["multi_label_classification", None]


def test_labels_set_after_attaching_are_the_adapters() -> None:
    model = _many_heads()
    model.config.id2label = {0: "no", 1: "yes"}
    with model.disable_adapter():
        assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
        model.config.id2label = {0: "bare 0", 1: "bare 1"}
    assert model.config.id2label == {0: "no", 1: "yes"}
    model.set_adapter("five")
    assert model.config.id2label[4] == "class4"
    model.set_adapter("two")
    assert model.config.label2id == {"no": 0, "yes": 1}
    model.config.num_labels = 3
    with pytest.warns(UserWarning, match="names 3 labels now, but the head in use has 2"):
        model.set_adapter("five")
    model.set_adapter("two")
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.unload().config.id2label == {0: "bare 0", 1: "bare 1"}


@pytest.mark.parametrize("method", TASK_METHODS)
def test_labels_and_loss_are_saved_as_they_are_when_saving(method: str, tmp_path) -> None:
    backbone = build("bert")
    backbone.config.id2label = {0: 0, 1: 1}  # names need not be strings
    model = get_peft_model(backbone, TASK_METHODS[method]())
    assert model.config.id2label == {0: 0, 1: 1}
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(build("bert"), tmp_path).config.id2label == {0: "0", 1: "1"}
    model.config.id2label = {0: "no", 1: "yes"}
    model(**INPUTS, labels=torch.eye(3)[:, :2])  # transformers infers the loss from floats
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.problem_type == loaded.peft_config["default"].problem_type == "multi_label_classification"


def test_head_modules_can_be_chosen_and_left_out() -> None:
    model = adapted("roberta", head_modules=["classifier.out_proj"], num_labels=3)
    assert run(model, INPUTS).shape == (3, 3)
    trained = {
        n.partition("modules_to_save")[0] for n, p in model.named_parameters() if p.requires_grad and "save" in n
    }
    assert trained == {"base_model.model.classifier.out_proj."}
    model = adapted("roberta", head_modules=[])
    assert all("spartan_memory" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="score"):
        adapted("roberta", head_modules=["score"])


@pytest.mark.parametrize("head_type", ["model", "linear"])
def test_a_dropout_may_be_named_as_a_part_of_the_head(head_type: str) -> None:
    modules = ["dropout", "classifier"]
    model = adapted("bert", head_modules=modules, head_type=head_type, random=False)
    found = run(model, INPUTS)
    if head_type == "model":
        assert torch.equal(found, run(build("bert"), INPUTS))
    randomize(model)
    add(model, "other", head_modules=modules, num_labels=3, head_type=head_type)
    alone = answers(model, INPUTS, "default", "other")
    mixed = run(model, INPUTS, adapter_names=["default", "other", "__base__"])
    torch.testing.assert_close(mixed[0, :2], alone["default"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], alone["other"][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[2, :2], alone["__base__"][2], rtol=1e-4, atol=1e-5)


def _segmentation(name: str) -> torch.nn.Module:
    """Models whose heads take feature maps: several tensors in one argument."""
    torch.manual_seed(0)
    if name == "segformer":
        sizes = {"hidden_sizes": [32, 32], "depths": [1, 1], "num_attention_heads": [2, 2], "patch_sizes": [3, 3]}
        ratios = {"sr_ratios": [2, 1], "strides": [2, 2], "mlp_ratios": [2, 2]}
        config = hf.SegformerConfig(num_encoder_blocks=2, decoder_hidden_size=8, num_labels=3, **sizes, **ratios)
        return hf.SegformerForSemanticSegmentation(config).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.BeitConfig(**sizes, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4], num_labels=3)
    return hf.BeitForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("name", ["segformer", "beit"])
def test_heads_that_take_feature_maps(name: str, tmp_path) -> None:
    images = {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    model = adapted(_segmentation(name), random=False)
    assert "decode_head" in model.peft_config["default"].head_modules
    expected = run(_segmentation(name), images)
    assert torch.equal(run(model, images), expected)
    randomize(model)
    add(model, "other")
    alone = answers(model, images, "default", "other")
    # Another copy of its weights, by which convolutions may round otherwise (an AMD EPYC: 2e-10 of 1e-3).
    torch.testing.assert_close(alone["__base__"], expected, rtol=1e-5, atol=1e-8)
    with model.disable_adapter():
        assert torch.equal(alone["__base__"], run(model, images))
    assert not torch.equal(alone["default"], expected)
    names = ["other", "__base__", "default"]
    mixed = run(model, images, adapter_names=names)
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[adapter][row], rtol=1e-4, atol=1e-4)
    half = adapted(_segmentation(name).bfloat16())  # its head computes in float32
    found = run(half, {"pixel_values": images["pixel_values"].bfloat16()})
    assert found.dtype == torch.bfloat16
    largest = alone["default"].abs().max().item()
    torch.testing.assert_close(found.float(), alone["default"], rtol=0, atol=0.05 * largest)  # a few roundings


@pytest.mark.parametrize("head_type", ["model", "linear"])
def test_heads_that_are_called_by_keyword(head_type: str) -> None:
    model = adapted("roberta", head_type=head_type)
    add(model, "other", num_labels=3, head_type=head_type)
    alone = answers(model, INPUTS, "default", "other")
    head = model.base_model.model.classifier
    by_position = head.forward
    head.forward = lambda features: by_position(features=features)
    assert torch.equal(answers(model, INPUTS, "default")["default"], alone["default"])
    mixed = run(model, INPUTS, adapter_names=["other", "default", "other"])
    torch.testing.assert_close(mixed[0], alone["other"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1, :2], alone["default"][1], rtol=1e-4, atol=1e-5)


def test_layer_norms_are_each_adapters_own(tmp_path) -> None:
    expected = run(build("bert"), INPUTS)
    model = adapted("bert", "norms", train_layer_norms=True, random=False)
    assert torch.equal(run(model, INPUTS), expected)
    randomize(model, "norms")
    add(model, "plain")
    add(model, "others", train_layer_norms=True)
    alone = answers(model, INPUTS, "norms", "plain", "others")
    assert torch.equal(alone.pop("__base__"), expected)
    assert torch.equal(alone["plain"], run(adapted("bert", "plain"), INPUTS))
    mixed = run(model, INPUTS, adapter_names=["others", "plain", "norms"])
    for row, name in enumerate(("others", "plain", "norms")):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    for name, answer in alone.items():
        model.set_adapter(name)
        own = {n for n, p in model.named_parameters() if p.requires_grad and "LayerNorm" in n}
        assert len(own) == (0 if name == "plain" else 2 * (2 * 3 + 1))  # weight, bias of two per layer and embeddings'
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path / name)
        assert torch.equal(run(loaded, INPUTS), answer)
    model.set_adapter("norms")
    model.delete_adapter("others")
    assert torch.equal(run(model, INPUTS), alone["norms"])
    assert torch.equal(run(model.unload(), INPUTS), expected)


@pytest.mark.parametrize("name", ["modernbert", "llama", "t5"])
def test_layer_norms_of_other_architectures(name: str, tmp_path) -> None:
    inputs = ARCHITECTURES[name].inputs()
    expected = run(build(name), inputs)
    model = adapted(name, train_layer_norms=True, random=False)
    assert torch.equal(run(model, inputs), expected)
    assert any("norm" in n.lower() and p.requires_grad for n, p in model.named_parameters())
    randomize(model)
    add(model, "second", train_layer_norms=True)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), expected)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    bare = model.unload()
    assert torch.equal(run(bare, inputs), expected)
    assert bare.state_dict().keys() == build(name).state_dict().keys()
