"""What memories read in one text, in the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import transformers as hf
from tests.inference.conftest import save_task
from tests.models import METHODS
from tests.tiny import save_tiny_backbone

from sparsepeft import MultiTaskEngine
from sparsepeft.inspection import read_text


def test_encoder_and_decoder_have_readings_of_their_own(tmp_path: Path) -> None:
    stacks = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    backbone = save_tiny_backbone(
        tmp_path / "bart",
        build=lambda vocab_size, **_: hf.BartForSequenceClassification(
            hf.BartConfig(
                vocab_size=vocab_size, max_position_embeddings=64, d_model=32, pad_token_id=0, bos_token_id=2,
                eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3, **stacks,
            )
        ),
    )  # fmt: skip
    folder = save_task(backbone, tmp_path / "task", METHODS["spartan"](num_labels=2))
    layers = read_text(MultiTaskEngine(backbone, {"task": folder}), "task", "the match was good").layers
    assert [(each.layer, each.name) for each in layers] == [
        (number, f"model.{side}.layers.{number}") for side in ("encoder", "decoder") for number in range(2)
    ]
    for encoders, decoders in zip(layers[:2], layers[2:], strict=True):
        assert not np.array_equal(encoders.gates, decoders.gates)


def test_layers_that_share_a_memory_have_a_reading_each(tmp_path: Path) -> None:
    backbone = save_tiny_backbone(
        tmp_path / "albert", build=lambda **c: hf.AlbertModel(hf.AlbertConfig(**c, embedding_size=16))
    )
    folder = save_task(backbone, tmp_path / "task", METHODS["spartan"](num_labels=2))
    layers = read_text(MultiTaskEngine(backbone, {"task": folder}), "task", "the match was good").layers
    assert [each.layer for each in layers] == [0, 1]
    assert layers[0].name == layers[1].name
    assert not np.array_equal(layers[0].gates, layers[1].gates)
