"""torch.compile and torch.export of an adapted model, of two layers: compiling takes its time for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import (
    ARCHITECTURES,
    METHODS,
    adapted,
    add,
    assert_gradients_close,
    build,
    gradients,
    labelled_inputs,
    run,
    without_dropout,
)

INPUTS = ARCHITECTURES["bert"].inputs()


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


def small(name: str, method: str, adapter: str = "default", **values: Any) -> PeftModel:
    config = build(name).config
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    return adapted(type(build(name))(config).eval(), adapter, config=METHODS[method](**values))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("spartan", "llama-seqcls"),
        ("pfeiffer", "bert"),
        pytest.param("houlsby", "vit", marks=pytest.mark.slow),
        pytest.param("bitfit", "bert", marks=pytest.mark.slow),
    ],
)
def test_compiled_answers_equal_eager_ones(method: str, name: str) -> None:
    """Compiled first: Pfeiffer's adapters look at their first pass to see how a layer ends."""
    inputs = ARCHITECTURES[name].inputs()
    model = small(name, method, num_labels=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "values"), [("spartan", {}), ("spartan", {"load_balancing_coef": 1.0}), ("pfeiffer", {})]
)
def test_compiled_training_has_the_same_gradients(method: str, values: dict[str, float]) -> None:
    inputs = labelled_inputs("bert")
    model = small("bert", method, **values).train()
    without_dropout(model)
    expected = gradients(model, inputs, scale=0.125)
    model.zero_grad()
    (torch.compile(model, backend="aot_eager")(**inputs).loss * 0.125).backward()
    assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.slow
def test_a_compiled_model_follows_the_active_adapter() -> None:
    model = small("bert", "spartan", "one")
    add(model, "two", num_labels=4)
    compiled = torch.compile(model, backend="eager")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(run(compiled, INPUTS), run(model, INPUTS), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(run(compiled, INPUTS), run(model, INPUTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "name", "head_type"),
    [("spartan", "roberta", "linear"), ("pfeiffer", "bert", "model"), ("bitfit", "bert", "model")],
)
def test_exported_answers_equal_eager_ones(method: str, name: str, head_type: str) -> None:
    model = small(name, method, head_type=head_type)
    program = torch.export.export(model.get_base_model(), (), kwargs=INPUTS, strict=False)
    torch.testing.assert_close(run(program.module(), INPUTS), run(model, INPUTS), rtol=1e-4, atol=1e-5)
