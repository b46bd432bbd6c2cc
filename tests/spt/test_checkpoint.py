"""What ``save_pretrained`` and ``save_sparse`` write of a sparse model, and what is loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.spt.models import ALL, build, change_routers, logits, sparse

from sparsepeft.errors import UserError
from sparsepeft.spt import desparsify, load_sparse, save_sparse, sparsification
from sparsepeft.spt.loading import SPARSE_WEIGHTS


@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_is_the_dense_one_with_what_was_added(name: str, tmp_path: Path) -> None:
    model = change_routers(sparse(name, compensation_rank=2))
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
    source = change_routers(sparse(name))
    expected, state = logits(source, name), build(name).state_dict()
    source.save_pretrained(str(tmp_path))
    checkpoint = load_file(tmp_path / "model.safetensors")
    for given in (source.state_dict(), checkpoint):
        model = sparse(name, batch=5)  # neurons are in another order
        orders = [sparsification(each).feed_forwards[0][1].spt_router.current.neuron_order for each in (model, source)]
        assert not torch.equal(*orders)
        model.load_state_dict(given, strict=False)  # tied weights are missing
        torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=0)
        desparsify(model)
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    model, routers = sparse(name), source.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state, strict=False)
    model.load_state_dict({key: routers[key] for key in routers if "spt_" in key}, strict=False)
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=0)


def test_other_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"made sparse in another way \(its settings differs\)"):
        sparse("llama").load_state_dict(sparse("llama", top_l=6).state_dict())


def test_settings_are_compared_by_their_meaning() -> None:
    """An earlier version's file has fewer keys."""
    model = sparse("llama", similarity="matches", values="routed")
    state = model.state_dict()
    (key,) = [key for key in state if key.endswith("spt_settings.original_module.settings")]
    settings = json.loads(bytes(state[key].tolist()))
    state[key] = torch.tensor(
        list(json.dumps({k: v for k, v in settings.items() if k not in ("similarity", "values", "budget")}).encode()),
        dtype=torch.uint8,
    )
    model.load_state_dict(state)


def test_a_dense_model_saves_as_it_did(tmp_path: Path) -> None:
    model = desparsify(sparse("bert"))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(str(tmp_path))
    assert load_file(tmp_path / "model.safetensors").keys() == build("bert").state_dict().keys()


# -- what save_sparse writes --


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("opt", {}),
        ("gpt2", {"attention": False, "num_active_blocks": 1}),
        ("bert", {"ffn": False, "top_l": 3}),
        ("t5-gated", {"attention": False, "num_active_blocks": 1}),
    ],
)
def test_a_dense_model_becomes_what_was_saved(name: str, settings: dict, tmp_path: Path) -> None:
    model = change_routers(sparse(name, **settings))
    expected = logits(model, name)
    assert not torch.equal(expected, logits(build(name), name))
    file = save_sparse(model, tmp_path / "new")
    assert file == tmp_path / "new" / SPARSE_WEIGHTS
    assert [path.name for path in file.parent.iterdir()] == [SPARSE_WEIGHTS]
    again = load_sparse(build(name), tmp_path / "new")
    torch.testing.assert_close(logits(again, name), expected, rtol=0, atol=0)
    assert sparsification(again).config == sparsification(model).config


def test_an_adapter_goes_on_top_of_a_loaded_one(tmp_path: Path) -> None:
    save_sparse(sparse("llama"), tmp_path)
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
    model = sparse("llama")
    file = save_sparse(model, tmp_path)
    with pytest.raises(ValueError, match="save_pretrained"):
        save_sparse(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tmp_path)
    with pytest.raises(UserError, match="does not belong to this model"):
        load_sparse(build("opt"), tmp_path)
    with pytest.raises(UserError, match=r"The adapter nope could not be loaded .* save_sparse wrote"):
        load_sparse(build("llama"), "nope")
    with pytest.raises(TypeError, match="load_sparse got a str; expected a transformers model"):
        load_sparse("nope", tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="could not be read"):
        load_sparse(build("llama"), tmp_path)
