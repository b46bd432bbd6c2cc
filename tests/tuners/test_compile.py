"""torch.compile and torch.export of an adapted model."""

from __future__ import annotations

import pytest
import torch
from tests.models import ARCHITECTURES, METHODS, adapted, add, assert_gradients_close, gradients, labelled_inputs, run


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("spartan", "bert"),
        ("spartan", "llama-seqcls"),
        ("pfeiffer", "bert"),
        *(pytest.param("spartan", name, marks=pytest.mark.slow) for name in ("roberta", "modernbert", "vit")),
        *(pytest.param("bitfit", name, marks=pytest.mark.slow) for name in ("bert", "vit")),
        *(pytest.param("pfeiffer", name, marks=pytest.mark.slow) for name in ("llama-seqcls", "vit")),
        *(pytest.param("houlsby", name, marks=pytest.mark.slow) for name in ("bert", "vit")),
    ],
)
def test_compiled_answers_equal_eager_ones(method: str, name: str) -> None:
    """Compiled first: Pfeiffer's adapters look at their first pass to see how a layer ends."""
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, config=METHODS[method](num_labels=3))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_has_the_same_gradients(method: str) -> None:
    inputs = labelled_inputs("bert")
    expected = gradients(adapted("bert", config=METHODS[method]()), inputs)
    model = adapted("bert", config=METHODS[method]())
    torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    assert_gradients_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.slow
def test_a_compiled_model_follows_the_active_adapter() -> None:
    inputs = ARCHITECTURES["bert"].inputs()
    model = adapted("bert", "one")
    add(model, "two", num_labels=4)
    compiled = torch.compile(model, backend="aot_eager")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "name", "head_type"),
    [
        ("spartan", "bert", "model"),
        ("spartan", "bert", "linear"),
        ("spartan", "roberta", "model"),
        ("spartan", "roberta", "linear"),
        ("pfeiffer", "bert", "linear"),
        pytest.param("houlsby", "bert", "model", marks=pytest.mark.slow),
        pytest.param("bitfit", "bert", "model", marks=pytest.mark.slow),
    ],
)
def test_exported_answers_equal_eager_ones(method: str, name: str, head_type: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, config=METHODS[method](head_type=head_type))
    program = torch.export.export(model.get_base_model(), (), kwargs=inputs, strict=False)
    torch.testing.assert_close(run(program.module(), inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
