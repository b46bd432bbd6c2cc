"""The mask that sparse attention reads, through transformers' own way of making masks."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionMaskInterface, DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from sparsepeft.models.masks import dense_mask, read_mask, sparse_mask

B, T = 2, 7
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def registered() -> None:
    AttentionMaskInterface.register("spt-test", sparse_mask)


def config(implementation: str, window: int | None = None):
    made = MistralConfig(**SIZES, sliding_window=window) if window else LlamaConfig(**SIZES)
    made._attn_implementation = implementation
    return made


def both(create, padding, cache=None, q=T, window=None, **kwargs):
    """Our mask as a dense one, and the one that transformers makes for SDPA."""
    given = {"inputs_embeds": torch.zeros(B, q, 16), "attention_mask": padding, "past_key_values": cache, **kwargs}
    return [create(config=config(implementation, window), **given) for implementation in ("spt-test", "sdpa")]


PADDINGS = {
    "none": None,
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7]),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("create", "window"),
    [(create_causal_mask, None), (create_bidirectional_mask, None), (create_sliding_window_causal_mask, 3)],
)
def test_equals_transformers_mask(create, window: int | None, padding: str) -> None:
    kwargs = {"allow_is_causal_skip": False} if create is create_causal_mask else {}
    mask, expected = both(create, PADDINGS[padding], window=window, **kwargs)
    parts = read_mask(mask, B, T, T)
    if expected is None:  # nothing to mask
        assert dense_mask(parts).all()
    else:
        real = torch.ones(B, T, dtype=torch.bool) if PADDINGS[padding] is None else PADDINGS[padding].bool()
        rows = real[:, None, :, None].expand(B, 1, T, T)  # queries that are padding are nobody's business
        assert torch.equal(dense_mask(parts)[rows], expected.expand(B, 1, T, T)[rows])
    assert parts.window == window


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_with_a_cache(kind: str) -> None:
    length, q = 12, 2
    cache = StaticCache(config("sdpa"), max_cache_len=length) if kind == "static" else DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(B, 1, T, 8), torch.zeros(B, 1, T, 8), layer)
    padding = torch.ones(B, T + q, dtype=torch.long)
    padding[0, :3] = 0
    mask, expected = both(create_causal_mask, padding, cache, q=q, allow_is_causal_skip=False)
    keys = expected.shape[-1]
    parts = read_mask(mask, B, q, keys)
    assert parts.query_positions.tolist() == [T, T + 1]
    assert torch.equal(dense_mask(parts), expected)


def test_a_prepared_mask_passes_through() -> None:
    """`generate` makes the mask beforehand for static caches; the model then takes it as it is."""
    mask, _ = both(create_causal_mask, PADDINGS["left"])
    again = create_causal_mask(
        config=config("spt-test"), inputs_embeds=torch.zeros(B, T, 16), attention_mask=mask, past_key_values=None
    )
    assert again is mask


@pytest.mark.parametrize(
    "wrong",
    [None, torch.ones(B, 1, T, T, dtype=torch.bool), torch.zeros(B, 1, 1, 2 * T + 2), torch.ones(B, T).int()],
    ids=["lost", "dense", "floats", "padding"],
)
def test_a_lost_or_foreign_mask_is_an_error(wrong: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"Sparse attention received (no mask|a mask of shape)"):
        read_mask(wrong, B, T, T)


def test_the_last_queries_alone() -> None:
    """Gemma 4 takes them, and cuts the third dimension of the mask, as if it was queries x keys."""
    mask, expected = both(create_causal_mask, PADDINGS["left"])
    parts = read_mask(mask[:, :, slice(-2, None), :], B, 2, T)
    assert torch.equal(dense_mask(parts), expected[:, :, -2:])
    for wrong in ((2, T - 1), (T + 1, T)):
        with pytest.raises(ValueError, match="a mask of shape"):
            read_mask(mask, B, *wrong)


def test_patterns_that_sparse_attention_does_not_know() -> None:
    made = config("spt-test")
    embeddings = torch.zeros(B, T, 16)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * B)
    with pytest.raises(ValueError, match="another pattern"):
        create_causal_mask(made, embeddings, None, None, position_ids=packed)
    with pytest.raises(ValueError, match="another pattern"):
        create_causal_mask(made, embeddings, None, None, or_mask_function=lambda b, h, q, k: k < 3)
    made.attention_chunk_size = 3
    with pytest.raises(ValueError, match="another pattern"):
        create_chunked_causal_mask(made, embeddings, None, None)
