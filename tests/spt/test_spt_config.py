"""Settings: what is a count and what a fraction, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparsepeft.methods.sparse import read_spt_settings
from sparsepeft.runs.config_file import parse_settings
from sparsepeft.spt import SptConfig


@pytest.mark.parametrize(
    ("text", "top_l", "active"), [("1", 1, 1), ("1.0", 40, 8), ("0.5", 20, 4), ("3", 3, 3), ("1e-3", 1, 1)]
)
def test_an_int_is_a_count_and_a_float_a_fraction(text: str, top_l: int, active: int) -> None:
    settings = parse_settings([f"top_l={text}", "num_blocks=8", f"num_active_blocks={text}"], "--spt-set")
    config = read_spt_settings(settings)
    assert read_spt_settings(json.loads(json.dumps(settings))) == config
    counted = config.with_length(40)
    found = counted.top_l, counted.num_active_blocks
    assert found == (top_l, active)
    assert {type(count) for count in found} == {int}
    assert SptConfig.from_json(counted.to_json()) == counted


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, 6.0, float("nan"), True, "2"])
@pytest.mark.parametrize("name", ["top_l", "num_active_blocks"])
def test_other_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.* expected an int of at least 1, which is a count, or a float"):
        SptConfig(**{name: value})


BAD = {
    **dict.fromkeys(("attention", "ffn", "keep_self", "keep_first"), (None, "yes", 1)),
    **dict.fromkeys(("codebook_interval", "compensation_rank"), (-1, 1.5, "x", True)),
    "num_codewords": (1, 17, None),
    "seed": (-1, "x", 2**32),
    "load_balancing_coef": (-1, "x", float("nan"), float("inf"), True),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_of_another_kind_or_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}`? was given.*(True or False|a (whole )?number)"):
        SptConfig(**{name: value})


def test_layers() -> None:
    assert SptConfig(layers_to_transform=3).layers_to_transform == (3,)
    for settings in ({}, {"ffn": False}, {"attention": False}):
        with pytest.raises(ValueError, match="layers_to_transform is empty"):
            SptConfig(layers_to_transform=(), **settings)


def test_files_of_before_hold_whole_floats_as_counts() -> None:
    saved = SptConfig(attention=False).to_json().replace('"top_l": 0.125', '"top_l": 6.0')
    assert SptConfig.from_json(saved).top_l == 6


def test_settings_of_single_modules() -> None:
    config = SptConfig(
        overrides={"a": {"top_l": 0.25}, "b": {"dense": True}, "c": {"num_blocks": 4, "num_active_blocks": 3}}
    )
    config = SptConfig.from_json(config.with_length(40).to_json())
    assert (config.of("a").top_l, config.top_l, config.of("b"), config.of("d")) == (10, 5, None, config)
    assert (config.of("c").num_blocks, config.of("c").num_active_blocks, config.of("c").overrides) == (4, 3, None)
    routed = SptConfig(num_active_blocks=0.25, overrides={"a": {"values": "routed"}}).of("a")
    assert (routed.num_blocks, routed.num_active_blocks) == (8, 2)  # the same share
    assert SptConfig(num_blocks=16, overrides={"a": {"values": "routed"}}).of("a").num_blocks == 16
    for blocks, active in ((16, 4), (8, 2), (2, 1)):
        finer = SptConfig(num_active_blocks=0.25, overrides={"a": {"num_blocks": blocks}}).of("a")
        assert (finer.num_blocks, finer.num_active_blocks) == (blocks, active)
    assert (
        SptConfig(num_blocks=8, num_active_blocks=8, overrides={"a": {"num_blocks": 4}}).of("a").num_active_blocks == 4
    )
    with pytest.raises(ValueError, match=r"budget=2 was given, which would let the perplexity rise by 200%"):
        SptConfig(budget=2)
    with pytest.raises(ValueError, match=r"overrides of a has 'topl'; expected some of .*top_l"):
        SptConfig(overrides={"a": {"topl": 3}})
    with pytest.raises(ValueError, match="overrides of a cannot be used: num_active_blocks=33"):
        SptConfig(overrides={"a": {"num_active_blocks": 33}})
    with pytest.raises(ValueError, match="overrides of a cannot be used: `dense='yes'`"):
        SptConfig(overrides={"a": {"dense": "yes"}})
    for value in ("a", ["a"], {"a": None}, {"a": "dense"}):
        with pytest.raises(ValueError, match="expected settings by the module's name, such as"):
            SptConfig(overrides=value)  # type: ignore[arg-type]


def test_files_of_before_mean_the_first_version() -> None:
    before = json.loads(SptConfig().to_json())
    del before["similarity"], before["values"]
    config = SptConfig.from_json(json.dumps(before))
    assert (config.similarity, config.values) == ("matches", "routed")
