"""Generation: with and without cache, with beams, with several adapters in a batch; and the states in between."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import PeftModel
from tests.models import ARCHITECTURES, METHODS, L, adapted, add, build

DECODERS = ["gpt2", "llama", "mixtral"]


def _prompts(name: str) -> dict[str, torch.Tensor]:
    inputs = ARCHITECTURES["llama"].inputs()
    if name in DECODERS:  # decoders continue at the end: pad on the left
        inputs = {key: value.flip(1) for key, value in inputs.items()}
    return inputs


def _task_type(name: str) -> str:
    return "CAUSAL_LM" if name in DECODERS else "SEQ_2_SEQ_LM"


def _generate(model: PeftModel, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(**inputs, **settings)


@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in METHODS for n in ("gpt2", "bart")] + [("spartan", "llama")]
)
def test_a_cache_changes_nothing(method: str, name: str) -> None:
    model = adapted(name, config=METHODS[method](task_type=_task_type(name)))
    inputs = _prompts(name)
    cached = _generate(model, inputs, use_cache=True)
    assert torch.equal(cached, _generate(model, inputs, use_cache=False))
    with model.disable_adapter():
        bare = _generate(model, inputs)
    assert torch.equal(bare, _generate(build(name), inputs))
    assert not torch.equal(cached, bare)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "mixtral", "bart"])
def test_each_row_of_a_mixed_batch_is_continued_by_its_own_adapter(name: str, num_beams: int) -> None:
    model = adapted(name, "one", task_type=_task_type(name))
    add(model, "two", num_parents=9, top_k=4, task_type=_task_type(name))
    inputs = _prompts(name)
    names = ["two", "__base__", "one"]
    mixed = _generate(model, inputs, num_beams=num_beams, adapter_names=names)
    with model.disable_adapter():
        alone = {"__base__": _generate(model, inputs, num_beams=num_beams)}
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        alone[adapter] = _generate(model, inputs, num_beams=num_beams)
    for row, adapter in enumerate(names):
        assert torch.equal(mixed[row], alone[adapter][row]), adapter
    assert not torch.equal(alone["one"], alone["two"])


@pytest.mark.parametrize("recorded_before", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_hidden_states_are_those_after_the_memory(name: str, recorded_before: bool) -> None:
    """Entry i is what layer i + 1 receives; the last is left to transformers, which may tie it to the final norm."""
    inputs = ARCHITECTURES[name].inputs()
    backbone = build(name)
    if recorded_before:  # transformers puts its recording hooks on the layers at the first use
        backbone(**inputs, output_hidden_states=True)
    model = adapted(backbone)
    received: list[torch.Tensor] = []
    layers = [module for module in model.modules() if type(module).__name__ == "SpartanLayer"]
    after_memory: list[torch.Tensor] = []
    for layer in layers:
        layer.base_layer.register_forward_pre_hook(
            lambda module, args, kwargs: received.append((args or tuple(kwargs.values()))[0].detach()), with_kwargs=True
        )
        layer.spartan_memory["default"].register_forward_hook(lambda m, args, out: after_memory.append(out.detach()))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == L + 1
    for index in range(L):
        assert torch.equal(states[index], received[index])
    for index in range(1, L):
        assert torch.equal(states[index], after_memory[index - 1])


def _musicgen() -> hf.PreTrainedModel:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
    audio = {"num_filters": 2, "hidden_size": 8, "num_lstm_layers": 1}
    decoder = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    decoder |= {"pad_token_id": 32, "bos_token_id": 32}
    parts = {"text_encoder": hf.T5Config(**sizes), "audio_encoder": hf.EncodecConfig(**audio)}
    config = hf.MusicgenConfig(**parts, decoder=hf.MusicgenDecoderConfig(**decoder))
    torch.manual_seed(0)
    return hf.MusicgenForConditionalGeneration(config).eval()


def test_guidance_of_a_models_own_is_refused_in_a_mixed_batch() -> None:
    model = _musicgen()
    layers = [f"decoder.model.decoder.layers.{number}" for number in range(2)]
    model = adapted(model, "one", target_modules=layers)
    add(model, "two", target_modules=layers)
    inputs = {"input_ids": torch.arange(3, 13).reshape(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    settings = {"max_new_tokens": 3, "min_new_tokens": 0, "return_dict_in_generate": True, "output_logits": True}

    def scores(guidance: float, **names: list[str]) -> torch.Tensor:
        generated = model.generate(**inputs, **settings, guidance_scale=guidance, do_sample=False, **names)
        return generated.logits[0].reshape(2, -1)

    mixed = scores(1.0, adapter_names=["one", "two"])
    for row, name in enumerate(("one", "two")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], scores(1.0)[row])
        torch.testing.assert_close(scores(3.0, adapter_names=[name, name]), scores(3.0))
    with pytest.raises(ValueError, match=r"guidance_scale above 1.*each adapter by itself"):
        scores(3.0, adapter_names=["one", "two"])
