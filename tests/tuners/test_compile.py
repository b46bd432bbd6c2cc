"""torch.compile and torch.export of an adapted model."""

from __future__ import annotations

import pytest
import torch
from tests.models import ARCHITECTURES, adapted, add, run


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name",
    ["bert", "llama-seqcls", *(pytest.param(n, marks=pytest.mark.slow) for n in ("roberta", "modernbert", "vit"))],
)
def test_compiled_answers_equal_eager_ones(name: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, num_labels=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_has_the_same_gradients() -> None:
    inputs = ARCHITECTURES["bert"].inputs() | {"labels": torch.tensor([0, 1, 1])}
    model = adapted("bert")
    model(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


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


@pytest.mark.parametrize("head_type", ["model", "linear"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_exported_answers_equal_eager_ones(name: str, head_type: str) -> None:
    inputs = ARCHITECTURES[name].inputs()
    model = adapted(name, head_type=head_type)
    program = torch.export.export(model.get_base_model(), (), kwargs=inputs, strict=False)
    torch.testing.assert_close(run(program.module(), inputs), run(model, inputs), rtol=1e-4, atol=1e-5)
