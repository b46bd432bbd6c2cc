"""Continuing texts: the same tokens alone, in a batch and by transformers itself; draws that nothing else moves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stories import OPENING, save_stories_model
from tests.tiny import run_config, save_tiny_language_model, topics_text

from sparsepeft.errors import UserError
from sparsepeft.training import GenerationSettings, Generator, RunConfig, train

pytestmark = pytest.mark.slow
PROMPTS = ["the team won", "the striker", "the bank said the"]
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "sparse": {"spt": {"top_l": 0.5, "num_blocks": 4, "num_active_blocks": 3}},
    "full": {"method": "full", "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each kind on a tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    model, text = save_tiny_language_model(folder / "model"), topics_text(folder)
    for name, values in RUNS.items():
        settings = {"learning_rate": 0.01, "max_steps": 8, "block_length": 32, "batch_size": 8} | values
        train(RunConfig("lm", str(folder / name), text=(str(text),), model=str(model), **settings))
    return {name: folder / name for name in RUNS}


def _texts(generator: Generator, prompts: list[str], **values: Any) -> list[list[str]]:
    return list(generator.generate(prompts, GenerationSettings(**({"max_new_tokens": 10} | values))))


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_gives_what_each_prompt_gives_alone(name: str, runs: dict[str, Path]) -> None:
    generator = Generator(runs[name])
    texts = _texts(generator, PROMPTS)
    assert texts == [_texts(generator, [prompt])[0] for prompt in PROMPTS]
    assert len({text for (text,) in texts}) == 3
    tokenizer, model = generator.tokenizer, generator.model
    for prompt, (text,) in zip(PROMPTS, texts, strict=True):
        # [CLS] begins a block in training, so it begins a prompt; every token anew, without a cache.
        ids = torch.tensor([[2, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            for _ in range(10):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        expected = tokenizer.decode(ids[0, 1:].tolist()).partition(" [SEP]")[0]
        assert f"{prompt}{text}" == expected
    pieces: list[str] = []
    settings = GenerationSettings(max_new_tokens=10)
    assert next(generator.generate(PROMPTS[:1], settings, on_text=pieces.append)) == texts[0]
    assert "".join(pieces) == texts[0][0]
    assert len(pieces) > 3


def test_draws_depend_on_nothing_else(runs: dict[str, Path]) -> None:
    generator = Generator(runs["lora"])
    drawn = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    alone = _texts(generator, PROMPTS[1:2], **drawn)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert _texts(Generator(runs["lora"]), PROMPTS, **drawn)[1] == alone[0]
    assert len(set(alone[0])) == 3
    assert _texts(generator, PROMPTS[1:2], **drawn, seed=1) != alone
    assert _texts(generator, PROMPTS[1:2], do_sample=True, top_k=1) == _texts(generator, PROMPTS[1:2])


def test_stops_and_chat(runs: dict[str, Path]) -> None:
    generator = Generator(runs["lora"])
    ((whole,),) = _texts(generator, PROMPTS[:1])
    third = whole.split()[2]
    for stops in (third, [third], (third,)):
        assert _texts(generator, PROMPTS[:1], stop_strings=stops) == [[whole[: whole.index(third)]]]
    with pytest.raises(UserError, match=r"`chat=True` was given, but .* no chat template"):
        generator.generate(PROMPTS, chat=True)
    generator.tokenizer.chat_template = "[CLS] {% for m in messages %}the {{ m.content }}{% endfor %}"
    settings = GenerationSettings(max_new_tokens=10)
    assert next(generator.generate(["team won"], settings, chat=True)) == [whole]
    generator.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="chat template cannot be used"):
        generator.generate(PROMPTS, chat=True)


BAD = {
    **dict.fromkeys(("temperature=0.5", "num_return_sequences=2"), "without `do_sample`"),
    **dict.fromkeys(("max_new_tokens=0", "max_new_tokens='5'", "max_new_tokens=1.5"), "whole number of at least 1"),
    **dict.fromkeys(("num_return_sequences=None", "num_return_sequences=True"), "whole number of at least 1"),
    **dict.fromkeys(("top_k=-1", "top_k=1.5"), "whole number of at least 0"),
    **dict.fromkeys(
        ("seed=-1", "seed=None", "seed=99999999999999999999"), "whole number from 0 to 9223372036854775807"
    ),
    **dict.fromkeys(("temperature=nan", "temperature=inf", "temperature='1'", "top_p=nan", "top_p=0"), "above 0"),
    "top_p=1.5": "at most 1",
    "do_sample='yes'": "True or False",
    **dict.fromkeys(("stop_strings=None", "stop_strings=[5]"), "a text, or a list of texts"),
}


@pytest.mark.parametrize("given", BAD)
def test_bad_settings(given: str) -> None:
    name, value = given.split("=")
    with pytest.raises(UserError) as caught:
        GenerationSettings(**{name: eval(value, {"nan": float("nan"), "inf": float("inf")})})
    assert f"`{given}`" in str(caught.value)
    assert BAD[given] in str(caught.value)


def test_bad_calls(runs: dict[str, Path], tiny_backbone: Path, tmp_path: Path) -> None:
    generator = Generator(runs["lora"], dtype="bf16")
    assert generator.model.dtype == torch.bfloat16
    for prompts, words in ((["x " * 64], "takes 64 in all; shorten"), ([7], "is no text"), (["\ud83d"], "surrogate")):
        with pytest.raises(UserError, match=words):
            generator.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"up to 60 are added, but .* 64 in all; .* smaller `max_new_tokens`"):
        _texts(generator, PROMPTS, max_new_tokens=60)
    # What there is room for: 60 and 58 tokens, less where the text ends.
    assert len(_texts(generator, ["the bank said the", "the striker scored"], max_new_tokens=None)) == 2
    with pytest.raises(UserError, match="one continuation of one prompt"):
        generator.generate(PROMPTS, on_text=print)
    with pytest.raises(UserError, match=r"^Prompt 2: .* is no text"):
        generator.generate(["the team", 7])  # type: ignore[list-item]
    with pytest.raises(UserError, match="expected GenerationSettings"):
        generator.generate(PROMPTS, {"max_new_tokens": 3})  # type: ignore[arg-type]
    assert repr(generator) == f"Generator({str(runs['lora'])!r}: lora, bfloat16 on {generator.device})"
    for values, words in (
        ({"dtype": "int8"}, "`dtype=int8` was given; expected fp32"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            Generator(runs["lora"], **values)  # type: ignore[arg-type]
    moved = shutil.copytree(runs["lora"], tmp_path / "run")
    run = (moved / "run.json").read_text(encoding="utf-8")
    (moved / "run.json").write_text(run.replace(str(runs["lora"].parent), str(tmp_path)), encoding="utf-8")
    with pytest.raises(UserError, match="not there any more; pass the folder that it has moved to as `model`"):
        Generator(moved)
    assert Generator(moved, str(runs["lora"].parent / "model")).method == "lora"
    train(run_config(tiny_backbone, tmp_path / "labels", max_steps=1))
    with pytest.raises(UserError, match=r"'topics'.*`sparsepeft predict`"):
        Generator(tmp_path / "labels")


def test_a_real_model_goes_on_with_its_story(tmp_path: Path) -> None:
    model, text = save_stories_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(f"{OPENING} " * 40, encoding="utf-8")
    short = {"learning_rate": 1e-9, "max_steps": 1, "block_length": 32}
    config = RunConfig("lm", str(tmp_path / "o"), "full", str(model), text=(str(text),), **short)
    assert train(config)["bos_token"] == "<s>"
    generator = Generator(tmp_path / "o")
    opening = OPENING[: OPENING.index(" She")]
    # The space that begins a text goes when it is decoded by itself; an empty prompt begins a story.
    texts = _texts(generator, ["", opening], max_new_tokens=60)
    assert texts[0][0].startswith(OPENING[:60])
    assert texts[1][0].startswith(" She loved to play outside in the park.")
