"""What ``save_pretrained`` of a sparse model writes, and what its ``load_state_dict`` takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.spt.models import ALL, FEED_FORWARD_ONLY, build, inputs, logits

from sparsepeft.spt import SptConfig, desparsify, load_sparse, sparsification, sparsify


def sparse(name: str, batch: int = 3, **values: object) -> torch.nn.Module:
    settings = {"attention": name not in FEED_FORWARD_ONLY, "top_l": 5, "num_blocks": 4, "num_active_blocks": 2}
    model = sparsify(build(name), SptConfig(**settings | values), inputs(name, padding=None, batch=batch))  # type: ignore[arg-type]
    with torch.no_grad():  # as if it had been trained
        for _, routed in sparsification(model).feed_forwards:  # type: ignore[union-attr]
            for parameter in routed.spt_router.current.parameters():
                parameter.mul_(-1.5)
    return model


@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_is_the_dense_one_with_what_was_added(name: str, tmp_path: Path) -> None:
    model = sparse(name, compensation_rank=2)
    expected, state = logits(model, name), build(name).state_dict()
    model.save_pretrained(str(tmp_path), max_shard_size="30KB")
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 1
    saved = {key: tensor for file in files.values() for key, tensor in file.items()}
    dense = {key: tensor for key, tensor in saved.items() if not key.startswith("spt.")}
    assert dense.keys() <= state.keys()  # tied weights are saved once
    assert all(torch.equal(tensor, state[key]) for key, tensor in dense.items())
    assert "spt" not in json.loads((tmp_path / "config.json").read_text()).values()
    loaded, info = type(model).from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded.eval(), name), logits(build(name), name))
    torch.testing.assert_close(logits(load_sparse(loaded, tmp_path), name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5-gated"])
def test_state_dicts_of_every_kind_are_loaded(name: str, tmp_path: Path) -> None:
    source = sparse(name)
    expected, state = logits(source, name), build(name).state_dict()
    source.save_pretrained(str(tmp_path))
    checkpoint = load_file(tmp_path / "model.safetensors")
    for given in (source.state_dict(), checkpoint):
        model = sparse(name, batch=5)  # neurons are in another order
        assert not torch.equal(
            *(sparsification(each).feed_forwards[0][1].spt_router.current.neuron_order for each in (model, source))
        )  # type: ignore
        model.load_state_dict(given, strict=False)  # tied weights are missing
        torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=0)
        desparsify(model)
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    model, routers = sparse(name), sparse(name).state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state, strict=False)
    model.load_state_dict({key: routers[key] for key in routers if "spt_" in key}, strict=False)
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=0)


def test_other_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"made sparse in another way \(its settings differs\)"):
        sparse("llama").load_state_dict(sparse("llama", top_l=6).state_dict())


def test_a_dense_model_saves_as_it_did(tmp_path: Path) -> None:
    model = desparsify(sparse("bert"))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == build("bert").state_dict().keys()
