"""A sparse model without an adapter: saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.spt.models import build, inputs, logits

from sparsepeft.errors import UserError
from sparsepeft.spt import SptConfig, load_sparse, save_sparse, sparsification, sparsify
from sparsepeft.spt.loading import SPARSE_WEIGHTS

CONFIG = SptConfig(top_l=6, num_blocks=4, num_active_blocks=2)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", CONFIG),
        ("opt", CONFIG),
        ("gpt2", SptConfig(attention=False, num_blocks=4, num_active_blocks=1)),
        ("bert", SptConfig(ffn=False, top_l=3)),
        ("t5-gated", SptConfig(attention=False, num_blocks=4, num_active_blocks=1)),
    ],
)
def test_a_dense_model_becomes_what_was_saved(name: str, config: SptConfig, tmp_path: Path) -> None:
    model = sparsify(build(name), config, inputs(name))
    with torch.no_grad():  # a router that was trained without an adapter is saved as it is
        for _, routed in sparsification(model).feed_forwards:  # type: ignore[union-attr]
            for parameter in routed.spt_router.current.parameters():
                parameter.mul_(-1.5)
    expected = logits(model, name)
    assert not torch.equal(expected, logits(build(name), name))
    file = save_sparse(model, tmp_path / "new")
    assert file == tmp_path / "new" / SPARSE_WEIGHTS
    assert [path.name for path in file.parent.iterdir()] == [SPARSE_WEIGHTS]
    again = load_sparse(build(name), tmp_path / "new")
    torch.testing.assert_close(logits(again, name), expected, rtol=0, atol=0)
    assert sparsification(again).config == sparsification(model).config  # type: ignore[union-attr]


def test_an_adapter_goes_on_top_of_a_loaded_one(tmp_path: Path) -> None:
    save_sparse(sparsify(build("llama"), CONFIG, inputs("llama")), tmp_path)
    model = get_peft_model(load_sparse(build("llama"), tmp_path), LoraConfig(target_modules=["q_proj"], r=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("spt_router" in name for name in trained)
    expected = logits(model.eval(), "llama")
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load_sparse(build("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, "llama"), expected, rtol=0, atol=0)


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not sparse"):
        save_sparse(build("llama"), tmp_path)
    sparse = sparsify(build("llama"), CONFIG, inputs("llama"))
    file = save_sparse(sparse, tmp_path)
    with pytest.raises(ValueError, match="save_pretrained"):
        save_sparse(get_peft_model(sparse, LoraConfig(target_modules=["q_proj"])), tmp_path)
    with pytest.raises(UserError, match="does not belong to this model"):
        load_sparse(build("opt"), tmp_path)
    with pytest.raises(UserError, match=r"The adapter nope could not be loaded .* save_sparse wrote"):
        load_sparse(build("llama"), "nope")
    with pytest.raises(TypeError, match="load_sparse got a str; expected a transformers model"):
        load_sparse("nope", tmp_path)  # type: ignore[arg-type]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="could not be read"):
        load_sparse(build("llama"), tmp_path)
