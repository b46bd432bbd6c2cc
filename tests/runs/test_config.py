"""Flags over file over recipe, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sparsepeft.errors import UserError
from sparsepeft.methods.models import adapter_config
from sparsepeft.methods.recipes import METHODS, RECIPES, get_recipe
from sparsepeft.training import RunConfig, load_config, parse_settings


def test_flags_win_over_file_and_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: topics\nlearning_rate: 0.5\nbatch_size: 4\nsettings: {top_k: 2, num_parents: 6}\n")
    config = load_config({"output_dir": "o", "batch_size": 8, "settings": {"top_k": 3}, "epochs": None}, file)
    recipe = config.recipe_values()
    assert (config.task, recipe.learning_rate, recipe.batch_size) == ("topics", 0.5, 8)
    assert recipe.adapter["top_k"] == 3
    assert recipe.adapter["num_parents"] == 6
    assert recipe.adapter["num_children"] == get_recipe("best", "spartan").adapter["num_children"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"task": "topics"}, ["No `output_dir` was given"]),
        ({}, ["No `task` and no `output_dir` was given"]),
        ({"task": "topics", "output_dir": "o", "method": "spartn"}, ["'spartn'", "lora", "did you mean 'spartan'"]),
        ({"task": "topics", "output_dir": "o", "recipe": "bets"}, ["did you mean 'best'", "paper"]),
        ({"task": "topics", "output_dir": "o", "score_on": "selecton"}, ["did you mean 'selection'"]),
        ({"task": "topics", "output_dir": "o", "precision": "bf15"}, ["did you mean 'bf16'"]),
        ({"task": "topics", "output_dir": "o", "epochs": -1}, ["`epochs=-1`", "above 0"]),
        ({"task": "topics", "output_dir": "o", "few_shot": 0}, ["`few_shot=0`", "at least 1"]),
        ({"task": "topics", "output_dir": "o", "learning_rate": float("nan")}, ["`learning_rate=nan`", "above 0"]),
        ({"task": "topics", "output_dir": "o", "epochs": float("inf")}, ["`epochs=inf`", "above 0"]),
        ({"task": "topics", "output_dir": "o", "batch_size": 2.5}, ["`batch_size=2.5`", "whole number"]),
        ({"task": "topics", "output_dir": "o", "settings": {"weight_decay": -1}}, ["`weight_decay=-1`", "at least 0"]),
        ({"task": "topics", "output_dir": "o", "warmup_ratio": 6}, ["`warmup_ratio=6`", "from 0 to 1"]),
        ({"task": "topics", "output_dir": "o", "lr_scheduler_type": "cos"}, ["`lr_scheduler_type`: 'cos'", "cosine"]),
        ({"task": "topics", "output_dir": "o", "few_shot": 9, "eval_steps": 5}, ["`eval_steps`", "`few_shot`"]),
        ({"task": "topics", "output_dir": "o", "few_shot": 9, "max_train_samples": 5}, ["`max_train_samples`"]),
        ({"task": "topics", "output_dir": "o", "seed": -3}, ["`seed=-3`"]),
        ({"task": "topics", "output_dir": "o", "seed": 2**32}, ["`seed=4294967296`", "4294967295"]),
        ({"task": "topics", "output_dir": "o", "max_steps": "5"}, ["`max_steps=5`", "a whole number"]),
        ({"task": "topics", "output_dir": "o", "text_column": 5}, ["`text_column=5`", "a text"]),
        ({"task": "topics", "output_dir": "o", "settings": [1]}, ["`settings=[1]`", "a mapping"]),
        ({"task": "topics", "output_dir": "o", "compile": "no"}, ["`compile=no`", "true or false"]),
        ({"task": "topics", "output_dir": "o", "save_dtype": "int4"}, ["`save_dtype`: 'int4'", "'int8'"]),
        ({"task": "topics", "output_dir": "o", "save_dtype": "int8", "method": "lora"}, ["`method=lora`", "pass bf16"]),
    ],
)
def test_bad_values_are_refused_in_one_sentence(flags: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(flags)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task: topics\nlerning_rate: 1\n", ["'lerning_rate'", "did you mean 'learning_rate'"]),
        ("[1, 2]", ["list", "mapping"]),
        ("task: [", ["not valid YAML"]),
        ("seed: 2024-13-45", ["not valid YAML", "month must be"]),
        ("epochs: 3\nsettings: {epochs: 2}\n", ["`epochs` was given both as a setting and as an option"]),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config({"output_dir": "o"}, file)
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(UserError, match="does not exist"):
        load_config({"output_dir": "o"}, tmp_path / "none.yaml")


def test_a_setting_called_like_an_option_is_that_option(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: custom\nproblem_type: regression\nsettings: {max_steps: 7}\n")
    config = load_config({"output_dir": "o", "settings": {"top_k": 3, "epochs": 2}}, file)
    assert (config.problem_type, config.max_steps, config.epochs) == ("regression", 7, 2)
    assert config.settings == {"top_k": 3}
    file.write_text("task: topics\noutput-dir: o\nmax-steps: 7\n")  # words joined as in options
    assert load_config({}, file).max_steps == 7


def test_a_field_of_the_other_kind_of_task_is_refused() -> None:
    text = {"text": "t.txt", "model": "m"}
    config = load_config({"task": "lm", "output_dir": "o", "data_dir": "/data", **text})  # it may be the environment's
    assert (config.method, config.text_column, config.data_dir) == ("lora", "text", None)
    assert RunConfig("topics", "o").method == "spartan"
    for task, values, words in (
        ("lm", text | {"few_shot": 3}, "`few_shot` does not go with `task=lm`; leave it out"),
        ("lm", text | {"settings": {"compile": True, "few_shot": 3}}, "`compile`, `few_shot` do not go with `task=lm`"),
        ("topics", {"bos_token": False}, "`bos_token` goes with `task=lm` only, but the task is 'topics'"),
        ("lm", {}, "No `text` and no `model` was given"),
    ):
        with pytest.raises(UserError, match=words):
            load_config({"task": task, "output_dir": "o", **values})
        if "settings" not in values:
            with pytest.raises(UserError, match=words):
                RunConfig(task, "o", **values)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig("topics", "there", max_steps=7, settings={"top_k": 3}, spt={"num_blocks": 4}),
        RunConfig("lm", "there", "lora", "m", text=("t.txt",), bos_token=False, report_to=("tensorboard",)),
    ],
)
def test_what_a_run_leaves_is_a_config_file(tmp_path: Path, config: RunConfig) -> None:
    for name in ("run.json", "results.json"):
        (tmp_path / name).write_text(json.dumps({"format_version": 1, "config": config.to_dict()}))
        with pytest.raises(UserError, match="No `output_dir` was given"):
            load_config({}, tmp_path / name)
        again = load_config({"output_dir": "here"}, tmp_path / name)
        assert again == dataclasses.replace(config, output_dir="here")


def test_paths_and_numpys_numbers_are_plain_values(tmp_path: Path) -> None:
    config = RunConfig("topics", tmp_path / "o", max_steps=np.int64(2), epochs=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.to_dict()))["output_dir"] == str(tmp_path / "o")
    assert (config.max_steps, config.epochs) == (2, 0.5)


def test_settings_are_read_as_yaml() -> None:
    expected = {"top_k": 4, "temperature": 1.6, "train_layer_norms": True, "lr": 1e-3, "name": "1e-3"}
    assert (
        parse_settings(["top_k=4", "temperature=1.6", "train_layer_norms=true", "lr=1e-3", "name='1e-3'"]) == expected
    )
    for wrong, match in (
        (["top_k"], "key=value"),
        (["x=[a"], r"--set 'x=\[a' was given, but '\[a' cannot be read as a value \(while parsing"),
        (["x=2024-13-45"], "cannot be read as a value .month must be in 1..12"),
    ):
        with pytest.raises(UserError, match=match):
            parse_settings(wrong)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'num_parents'"):
        adapter_config("spartan", {"num_parent": 3})
    with pytest.raises(UserError, match="no adapter to configure"):
        adapter_config("full", {"top_k": 3})
    with pytest.raises(UserError, match="at most all parents"):
        adapter_config("spartan", {"top_k": 30})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_its_method(method: str, recipe: str) -> None:
    values = get_recipe(recipe, method)
    config = adapter_config(method, values.adapter)
    assert (config is None) == (method == "full")
    assert values.learning_rate > 0
