"""LoRA and IA3 on models PEFT has no defaults for: which layers, and that what is trained survives a save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from tests.models import D, V, build, labelled_inputs, run
from tests.real.models import MPNET, find_model
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sparsepeft.errors import UserError
from sparsepeft.methods.models import adapter_config, attach

MPNET_KEYS = {"attention.attn.k", "attention.attn.v"}
# Of IA3: the layers, and of them those of FFNs. DeBERTa's and GPT-2's are PEFT's own.
IA3 = {
    "mpnet": (MPNET_KEYS | {"output.dense"}, {"output.dense"}),
    "modernbert": ({"attn.Wqkv", "mlp.Wo"}, {"mlp.Wo"}),
    "albert": ({"attention.key", "attention.value", "ffn_output"}, {"ffn_output"}),
    "distilbert": ({"attention.k_lin", "attention.v_lin", "ffn.lin2"}, {"ffn.lin2"}),
    "deberta-v2": ({"key_proj", "value_proj", "output.dense"}, {"output.dense"}),
    "gpt2": ({"c_attn", "mlp.c_proj"}, {"mlp.c_proj"}),
    "custom": ({"mixing.both", "mixing.out", "proj", "widen"}, {"proj"}),
}


class _Layer(nn.Module):
    """A layer whose keys and values cannot be told by name."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.ModuleDict({"both": nn.Linear(D, 2 * D), "out": nn.Linear(D, D)})
        self.widen, self.proj = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, value = self.mixing["both"](states).chunk(2, -1)
        states = states + self.mixing["out"](torch.sigmoid(gate) * value.cumsum(1))
        return self.norm(states + self.proj(self.widen(states).relu()))


class _CustomConfig(PreTrainedConfig):
    model_type = "custom-mixer"


class _Custom(PreTrainedModel):
    config_class = _CustomConfig

    def __init__(self, config: _CustomConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(_Layer() for _ in range(config.num_hidden_layers))
        self.proj = nn.Linear(D, D)  # called as a part of the layers is
        self.score = nn.Linear(D, 2)
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **unused: Any) -> Any:
        states = self.embedding(input_ids)
        for layer in self.layers:
            states = layer(states)
        logits = self.score(self.proj(states).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _build(name: str) -> PreTrainedModel:
    if name != "custom":
        return build(name)
    torch.manual_seed(0)
    return _Custom(_CustomConfig(num_hidden_layers=2, hidden_size=D)).eval()


def _inputs(name: str) -> dict[str, torch.Tensor]:
    return labelled_inputs("bert" if name == "custom" else name)


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", IA3)
def test_what_is_trained_survives_a_save(name: str, method: str, tmp_path: Path) -> None:
    config = adapter_config(method, {})
    assert config is not None
    inputs = _inputs(name)
    before = run(_build(name), inputs)
    model = attach(_build(name), config, method)
    torch.testing.assert_close(run(model.eval(), inputs), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # LoRA's first matrices have no gradient in the first step
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    after = run(model, inputs)
    assert not torch.equal(after, before)
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(run(PeftModel.from_pretrained(_build(name), str(tmp_path)).eval(), inputs), after)


@pytest.mark.parametrize("name", IA3)
def test_layers_of_ia3(name: str) -> None:
    config = IA3Config()
    model = attach(_build(name), config, "ia3")
    targets, feedforward = IA3[name]
    if name == "custom":  # full names, since another module's name ends as one in the layers does
        targets, feedforward = (
            {f"layers.{i}.{n}" for i in range(2) for n in names} for names in (targets, feedforward)
        )
        assert model.base_model.model.proj.__class__ is nn.Linear
    assert set(config.target_modules) == targets  # type: ignore[arg-type]
    assert set(config.feedforward_modules) == feedforward  # type: ignore[arg-type]


def test_a_part_without_the_whole() -> None:
    config = adapter_config("ia3", {"feedforward_modules": ["output.dense"]})
    assert config is not None
    with pytest.raises(UserError, match=r"feedforward_modules=\['output.dense'\] was given without target_modules"):
        attach(build("mpnet"), config, "ia3")


@pytest.mark.real
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_real_mpnet(method: str) -> None:
    config = adapter_config(method, {}, task_type="SEQ_CLS")
    assert config is not None
    model = attach(AutoModelForSequenceClassification.from_pretrained(find_model(MPNET)), config, method)
    targets = {name.rpartition(".layer.")[2].partition(".")[2] for name in model.targeted_module_names}
    whole = {"attention.attn.q", "attention.attn.o", "intermediate.dense"}
    assert targets == MPNET_KEYS | {"output.dense"} | (whole if method == "lora" else set())
    assert len(model.targeted_module_names) == 12 * len(targets)
