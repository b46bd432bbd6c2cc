"""A tiny real language model (see the data's README): trained on children's stories, texts of which begin with <s>."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, processors

OPENING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def save_stories_model(folder: Path, bos: bool = True) -> Path:
    """The model with its tokenizer, which puts <s> before texts if ``bos``; a skip where there is none."""
    source = Path(os.environ.get("SPARSEPEFT_DATA", "none")).parent / "models" / "stories260k"
    if not source.is_dir():
        pytest.skip(f"{source} holds no model: set SPARSEPEFT_DATA to the data folder beside models/stories260k")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    pieces = [piece for piece, _ in json.loads((source / "tok512.json").read_text(encoding="utf-8"))]
    pieces[1:3] = "<s>", "</s>"
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}  # ids are in the order of the scores
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if not piece.startswith("<") and piece[:cut] in ranks and piece[cut:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE(ranks, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)
    return folder
