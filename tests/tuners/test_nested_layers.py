"""Adapters after modules that stand inside one another: a layer and its attention."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from tests.models import ARCHITECTURES, SMALL, adapted, add, build, randomize, run, task_layers

from sparsepeft import BitFitConfig, SpartanConfig

INPUTS = ARCHITECTURES["bert"].inputs()
BOTH = r".*\.layer\.\d+(\.attention)?"
CONFIGS = {
    "spartan": SpartanConfig(**SMALL, target_modules=BOTH, value_initializer_range=0.02, train_layer_norms=True),
    "bitfit": BitFitConfig(target_modules=BOTH),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_after_layers_and_their_attention_lives_as_any(tmp_path, method: str) -> None:
    backbone = build("bert")
    bare = run(backbone, INPUTS)
    model = adapted(copy.deepcopy(backbone), config=CONFIGS[method])
    assert len(task_layers(model)) == 6
    randomize(model)
    saved = get_peft_model_state_dict(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(saved) == len(trained)  # not the weights of the attention
    expected = run(model, INPUTS)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    torch.testing.assert_close(run(loaded, INPUTS), expected, rtol=0, atol=0)
    add(loaded, "other", config=CONFIGS[method])
    loaded.load_adapter(tmp_path, "again")
    assert len(task_layers(loaded)) == 6
    for name, answer in {"default": expected, "again": expected}.items():
        loaded.set_adapter(name)
        torch.testing.assert_close(run(loaded, INPUTS), answer, rtol=0, atol=0)
    add(loaded, "inner", config=dataclasses.replace(CONFIGS[method], target_modules=r".*\.layer\.\d+\.attention"))
    assert sum("inner" in layer._get_available_adapters() for layer in task_layers(loaded)) == 3
    loaded.delete_adapter("again")
    loaded.set_adapter("default")
    torch.testing.assert_close(run(loaded, INPUTS), expected, rtol=0, atol=0)
    with loaded.disable_adapter():
        torch.testing.assert_close(run(loaded, INPUTS), bare, rtol=0, atol=0)

    plain = loaded.unload()
    torch.testing.assert_close(run(plain, INPUTS), bare, rtol=0, atol=0)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in backbone.named_modules()]
