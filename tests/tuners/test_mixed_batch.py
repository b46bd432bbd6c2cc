"""One batch, several tasks: each row must get what its adapter gives alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tests.models import ARCHITECTURES, adapted, add, answers, run

INPUTS = ARCHITECTURES["bert"].inputs(batch=5)


@pytest.fixture
def model() -> PeftModel:
    model = adapted("bert", "two")
    add(model, "five", num_labels=5, num_parents=9, top_k=4)
    add(model, "small", num_labels=3, head_type="linear", layers_to_transform=[2])
    return model


ADAPTERS = ("two", "five", "small")


@pytest.mark.parametrize(
    "names",
    [
        ["two", "five", "small", "__base__", "five"],
        ["__base__"] * 5,
        ["small"] * 5,
        ["five", "five", "two", "two", "two"],
    ],
)
def test_rows_of_different_widths_are_padded_with_minus_infinity(model: PeftModel, names: list[str]) -> None:
    widths = {"two": 2, "five": 5, "small": 3, "__base__": 2}
    mixed, alone = run(model, INPUTS, adapter_names=names), answers(model, INPUTS, *ADAPTERS)
    assert mixed.shape == (5, max(widths[name] for name in names))
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row, : widths[name]], alone[name][row], rtol=1e-4, atol=1e-5)
        assert (mixed[row, widths[name] :] == float("-inf")).all()
    assert (mixed.softmax(-1).sum(-1) - 1).abs().max() < 1e-5


def test_a_mixed_batch_leaves_the_active_adapter_as_it_was_also_if_it_fails(model: PeftModel) -> None:
    model.set_adapter("five")
    expected = run(model, INPUTS)
    run(model, INPUTS, adapter_names=["two"] * 5)
    assert model.active_adapter == "five"
    assert torch.equal(run(model, INPUTS), expected)
    with pytest.raises(ValueError, match="one adapter name per input"):
        run(model, INPUTS, adapter_names=["two", "five"])
    assert torch.equal(run(model, INPUTS), expected)


def test_what_cannot_be_mixed_is_refused_in_words(model: PeftModel) -> None:
    with pytest.raises(ValueError, match=r"'nine'.*'__base__'"):
        run(model, INPUTS, adapter_names=["two", "nine", "two", "two", "two"])
    with pytest.raises(ValueError, match="leave labels out"):
        model(**INPUTS, adapter_names=["two"] * 5, labels=torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(**INPUTS, adapter_names=["two"] * 5)


def test_regression_and_classification_in_one_batch(model: PeftModel) -> None:
    add(model, "degree", num_labels=1)
    names = ["degree", "five", "degree", "two", "two"]
    mixed = run(model, INPUTS, adapter_names=names)
    assert mixed.shape == (5, 5)
    alone = answers(model, INPUTS, "degree")["degree"]
    torch.testing.assert_close(mixed[[0, 2], :1], alone[[0, 2]], rtol=1e-4, atol=1e-5)


def test_hidden_states_of_a_mixed_batch_are_each_adapters_own(model: PeftModel) -> None:
    names = ["two", "five", "small", "__base__", "five"]
    with torch.no_grad():
        mixed = model(**INPUTS, adapter_names=names, output_hidden_states=True).hidden_states
        for name in set(names) - {"__base__"}:
            model.set_adapter(name)
            alone = model(**INPUTS, output_hidden_states=True).hidden_states
            rows = [row for row, given in enumerate(names) if given == name]
            for layer, states in enumerate(mixed):
                torch.testing.assert_close(states[rows], alone[layer][rows], rtol=1e-4, atol=1e-5)
