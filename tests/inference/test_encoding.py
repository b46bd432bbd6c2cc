"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from sparsepeft.inference.encoding import num_positions

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
_BART = {"d_model": 32, "max_position_embeddings": 20} | {
    f"{side}_{key}": n
    for side in ("encoder", "decoder")
    for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))
}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        *((kind, _SIZES, 18) for kind in ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text")),
        ("longformer", _SIZES | {"attention_window": 6}, 18),
        ("bert", _SIZES, 20),
        ("bart", _BART, 20),
        ("opt", _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, 20),
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 20}, 20),
    ],
)
def test_a_model_runs_at_its_positions_and_at_no_more(kind: str, sizes: dict[str, Any], expected: int) -> None:
    config = hf.AutoConfig.for_model(kind, vocab_size=64, pad_token_id=1, **sizes)
    state = torch.get_rng_state()
    assert num_positions(config) == expected
    assert torch.equal(torch.get_rng_state(), state)  # or asking would change what is trained
    model = hf.AutoModel.from_config(config).eval()
    ids = torch.full((1, expected + 1), 5)
    assert model(input_ids=ids[:, :expected]).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize("kind", ["xlnet", "t5", "bloom"])
def test_models_without_a_table_have_no_limit(kind: str) -> None:
    assert num_positions(hf.AutoConfig.for_model(kind)) is None
