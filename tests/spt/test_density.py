"""A sparse model that computes as the dense one: layer by layer, in the first steps, where labels count, in answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from tests.spt.models import ALL, SIZES, TARGETS, T, build, inputs, logits, sparse

from sparsepeft import SpartanConfig
from sparsepeft.spt import SptConfig, answering, desparsify, labelled, load_sparse, sparsification, sparsify

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the same sums in another order


def layers(model: Any) -> list[Any]:
    state = sparsification(model)
    return [*state.attention.values(), *(routed for _, routed in state.feed_forwards)]


def with_lora(name: str, **values: Any) -> Any:
    model = sparse(name, values="routed", **values)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=TARGETS[name], r=3, init_lora_weights=False)
    return get_peft_model(model, lora).eval().double()


def densely(model: Any, name: str) -> torch.Tensor:
    with answering(model, "dense"):
        return logits(model, name)


@pytest.mark.parametrize("name", ALL)
def test_a_dense_layer_is_the_dense_models(name: str) -> None:
    padding = "right" if name == "mistral" else "left"
    model, expected = sparse(name, values="routed").double(), logits(build(name).double(), name, padding)
    before = logits(model, name, padding)
    for layer in layers(model):
        layer.dense = True
    torch.testing.assert_close(logits(model, name, padding), expected)
    layers(model)[0].dense = False
    partly = logits(model, name, padding)
    assert not torch.allclose(partly, expected, **CLOSE)
    assert not torch.allclose(partly, before, **CLOSE)


@pytest.mark.parametrize("name", TARGETS)
def test_dense_answers_are_those_of_the_adapter_on_the_dense_model(name: str, tmp_path: Path) -> None:
    model = with_lora(name)
    expected, before = densely(model, name), logits(model, name)
    assert not torch.allclose(expected, before, **CLOSE)
    model.float().save_pretrained(str(tmp_path / "sparse"))
    loaded = load_sparse(build(name), tmp_path / "sparse", infer="dense").double()
    torch.testing.assert_close(logits(loaded, name), expected, **CLOSE)
    with answering(loaded, "sparse"):
        torch.testing.assert_close(logits(loaded, name), before, **CLOSE)

    assert desparsify(loaded) is loaded
    assert sparsification(loaded) is None
    loaded.float().save_pretrained(str(tmp_path / "dense"))
    plain = PeftModel.from_pretrained(build(name), str(tmp_path / "dense")).eval().double()  # needs PEFT alone
    assert plain.state_dict().keys() == loaded.state_dict().keys()
    torch.testing.assert_close(logits(plain, name), expected, **CLOSE)
    torch.testing.assert_close(logits(loaded.double().merge_and_unload(), name), expected, **CLOSE)


def test_only_what_the_dense_model_can_take_stays_on_it() -> None:
    model = get_peft_model(sparse("bert"), SpartanConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="SpartanConfig, which belongs to the sparse backbone"):
        desparsify(model)
    with pytest.raises(ValueError, match="dense LlamaForCausalLM"), answering(build("llama"), "dense"):
        pass


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_texts_are_continued_densely(name: str) -> None:
    """With a cache, and a padded prompt."""
    model, given = sparse(name, values="routed"), inputs(name)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with answering(model, "dense"):
        found = model.generate(**given, **settings)
    assert torch.equal(found, build(name).generate(**given, **settings))
    assert not torch.equal(found, model.generate(**given, **settings))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_first_steps_are_dense(checkpointing: bool | None) -> None:
    """``checkpointing`` is whether it is reentrant."""
    given, found = inputs("llama"), []
    for dense_steps in (2, 0):
        model = with_lora("llama", dense_steps=dense_steps, codebook_interval=1, load_balancing_coef=0.0).train()
        assert all(layer.dense is False for layer in layers(model))
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        books = sparsification(model).attention["model.layers.0.self_attn"].state
        for _ in range(3):
            dense, its_own = densely(model.eval(), "llama"), logits(model, "llama")
            output = model.train()(**given, labels=given["input_ids"])
            shown = output.logits.detach() * given["attention_mask"][..., None]
            found.append((torch.allclose(shown, dense), torch.allclose(shown, its_own)))
            output.loss.backward()
            routers = [p.grad for n, p in model.named_parameters() if "spt_router" in n and p.requires_grad]
            assert all(grad is not None for grad in routers)  # which DDP waits for
            assert any(grad.any() for grad in routers) != found[-1][0]
            if checkpointing is not None:
                expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
                model.zero_grad()
                model.gradient_checkpointing_disable()
                model(**given, labels=given["input_ids"]).loss.backward()
                for gradient, parameter in zip(
                    expected, [p for p in model.parameters() if p.grad is not None], strict=True
                ):
                    torch.testing.assert_close(gradient, parameter.grad)
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(books.current.codebooks, books.original_module.codebooks)  # by dense steps, too
    assert found == [(True, False)] * 2 + [(False, True)] * 4


@pytest.mark.parametrize("steps", [1, 3])
def test_an_adapter_that_had_its_dense_steps_is_trained_on_without(steps: int, tmp_path: Path) -> None:
    """With a new optimizer. One that was saved before their end has them from the start."""

    def dense_passes(model: Any, steps: int) -> list[bool]:
        optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(steps):
            found.append(layers(model)[0].is_dense)
            model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
            optimizer.step()
        return found

    model = with_lora("llama", dense_steps=3).float()
    assert dense_passes(model, steps) == [True] * steps
    model.save_pretrained(tmp_path)
    for again in (load_sparse(build("llama"), tmp_path, is_trainable=True), model):
        assert dense_passes(again, 5) == [steps < 3] * 3 + [False] * 2


def masked_language_model(name: str) -> Any:
    if name != "bert":
        return build(name)
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return model


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("values", ["routed", "exact"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "bert"])
def test_where_labels_count_training_is_dense(name: str, values: str) -> None:
    """Sparse is the last layer, so that there is one dense state and one sparse state for each position to have."""
    given = inputs(name)
    labels = given["input_ids"].clone()
    labels[:, :-7] = -100  # ragged: each row learns at other positions
    labels[0, -3:] = -100
    counts = labels.ne(-100)
    if name != "bert":
        counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
    settings = {"top_l": 4, "num_blocks": 4, "num_active_blocks": 1, "load_balancing_coef": 0.0, "values": values}
    config = SptConfig(**settings, layers_to_transform=1, dense_labels=True)
    model = without_dropout(sparsify(masked_language_model(name), config, given)).double()
    dense = without_dropout(masked_language_model(name)).double().train()
    its_own = logits(model, name)
    output, expected = model.train()(**given, labels=labels), dense(**given, labels=labels)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(output.logits[counts], expected.logits[counts])
    torch.testing.assert_close(output.logits[~counts & real], its_own[~counts & real])
    assert not torch.allclose(its_own[counts], expected.logits[counts], **CLOSE)

    output.loss.backward()
    expected.loss.backward()
    gradients = {plain: parameter.grad for plain, parameter in desparsify(model).named_parameters()}
    for key, parameter in dense.named_parameters():
        if parameter.grad is not None and "mlp" not in key and "fc" not in key and "layer.1" not in key:
            torch.testing.assert_close(gradients[key], parameter.grad, msg=key)


def test_labels_of_a_loss_outside_the_model_and_of_whole_texts(caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora("llama", dense_labels=True, load_balancing_coef=0.0).train()
    given = inputs("llama")
    labels = given["input_ids"].clone()
    labels[:, : T // 2] = -100
    inside = model(**given, labels=labels).logits
    alone = model(**given).logits
    assert not torch.allclose(inside, alone, **CLOSE)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with labelled(model, labels):
            outside = model(**given).logits
        torch.testing.assert_close(outside, inside)
        outside.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)

    message = r"labelled got labels tensor\(\[1, 2\]\); expected whole numbers \(B, T\)"
    with pytest.raises(ValueError, match=message), labelled(model, torch.tensor([1, 2])):
        pass

    texts = without_dropout(sparse("bert", values="routed", dense_labels=True)).train()
    with torch.no_grad():
        expected = texts(**inputs("bert")).logits
    torch.testing.assert_close(texts(**inputs("bert"), labels=torch.tensor([0, 1, 0])).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"dense_labels": True, "values": "exact"}, {"load_balancing_coef": 1.0}, {"dense_labels": True}],
    ids=str,
)
def test_two_passes_of_one_loss_are_run_again_as_they_were(settings: dict[str, Any], reentrant: bool) -> None:
    """As in a contrastive loss: the earlier pass is the later one to be differentiated."""
    model = without_dropout(sparse("llama", **{"top_l": 3, "num_active_blocks": 1} | settings)).double().train()
    model.enable_input_require_grads()
    ids = inputs("llama", None)["input_ids"]
    other, mask = ids.flip(1), torch.ones_like(ids)
    labels, other_labels = ids.clone(), other.clone()
    labels[:, : T // 2] = other_labels[:, T // 3 :] = -100
    mask[0, T // 2 :] = 0

    def gradients(by_logits: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        first, second = model(ids, mask, labels=labels), model(other, labels=other_labels)
        outside = first.logits.logsumexp(-1).mean() * second.logits.square().mean()
        (outside if by_logits else first.loss + 3 * second.loss).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = [gradients(by_logits) for by_logits in (False, True)]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for by_logits in (False, True):
        for name, gradient in gradients(by_logits).items():
            torch.testing.assert_close(gradient, expected[by_logits][name], msg=name)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("values", ["routed", "exact"])
def test_passes_without_gradients_have_positions_of_their_own(values: str, checkpointing: bool | None) -> None:
    """As reference models' passes are, between another one's forward and backward; ``checkpointing`` as above."""
    settings = {"top_l": 3, "dense_labels": True, "load_balancing_coef": 0.0, "values": values, "num_active_blocks": 1}
    model = without_dropout(sparse("llama", **settings)).double().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    ids = inputs("llama", None)["input_ids"]
    first, second = ids.clone(), ids.clone()
    first[:, : T // 2] = second[:, T // 2 :] = -100

    def backward(between: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(ids, labels=first).loss
        between()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    @torch.no_grad()
    def answers() -> list[torch.Tensor]:
        found = [model(ids).logits, model(ids, labels=second).logits]
        with labelled(model, first):
            found.append(model(ids).logits)
        with pytest.raises(AttributeError):  # a pass that fails
            model(ids, labels=second, past_key_values=3)
        return found

    before = answers()
    plain, told = backward(lambda: None), model(ids, labels=second).logits
    torch.testing.assert_close(before[1], told)
    assert not torch.allclose(before[0], before[1], **CLOSE)
    assert not torch.allclose(before[1], before[2], **CLOSE)
    for one, other in zip(plain, backward(answers), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(before, answers(), strict=True):
        torch.testing.assert_close(one, other)

    desparsify(copied := copy.deepcopy(model))
    assert not copied._forward_pre_hooks
    assert not copied._forward_hooks


def test_the_report_is_of_the_sparse_model_however_it_answers() -> None:
    values = {"values": "routed", "num_active_blocks": 1, "top_l": 6}
    assert (
        sparse("llama", infer="dense", **values).sparsification.report
        == sparse("llama", **values).sparsification.report
    )
