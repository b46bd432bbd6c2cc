"""Product quantization and its codebooks; the compiled kernels' build."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ops.sparse_attention_cases import CASES, make_inputs, on_grid

from sparsepeft.ops import fit_codebooks, native, refresh_codebooks, sparse_attention
from sparsepeft.ops.sparse_attention import encode
from sparsepeft.ops.sparse_attention.cpu import SOURCES, _library, why_not_built

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_encode_finds_the_nearest(impl: str) -> None:
    sizes = [(1, 16, 6), (37, 16, 4), (50, 5, 3), (33, 1, 12)]
    for (num_tokens, num_codewords, width), dtype in itertools.product(sizes, (torch.float32, *HALF)):
        vectors = torch.randn(2, 4, num_tokens, 12).to(dtype)
        codebooks = torch.randn(2, 12 // width, num_codewords, width)
        codes = encode(vectors.transpose(1, 2).contiguous().transpose(1, 2), codebooks, impl=impl)
        assert codes.dtype == torch.uint8
        assert codes.shape == (2, 4, num_tokens, 12 // width)
        subvectors = vectors.double().unflatten(-1, (-1, width)).movedim(2, 3)  # (B, H, M, T, W)
        distances = torch.cdist(subvectors, codebooks.double().repeat_interleave(2, 0)).movedim(2, 3)
        chosen = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
        assert (chosen - distances.amin(-1)).max() < 1e-5  # float32 rounding of a near tie


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_encode_gives_ties_to_the_lowest_codeword(impl: str) -> None:
    codebooks = torch.tensor([[[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]]])
    vectors = torch.tensor([[[[0.0, 1.0], [1.0, 1.0], [3.0, 0.0]]]])
    assert encode(vectors, codebooks, impl=impl).flatten().tolist() == [1, 1, 0]


def clusters(num_clusters: int = 16, spread: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of two heads and three sub-vectors around known centres, far apart: (2, N, 12) and (2, 3, C, 4)."""
    centres = 10 * torch.randn(2, 3, num_clusters, 4)
    members = torch.arange(40 * num_clusters) % num_clusters
    vectors = centres[:, :, members] + spread * torch.randn(2, 3, len(members), 4)
    return vectors.transpose(1, 2).flatten(2), centres


def test_k_means_finds_clusters() -> None:
    vectors, centres = clusters()
    codebooks = fit_codebooks(vectors, subvector_dim=4, seed=3)
    assert codebooks.shape == (2, 3, 16, 4)
    # Seeding by squared distance finds every cluster that is far from the others.
    assert torch.cdist(centres, codebooks).amin(-1).max() < 0.1


def test_every_codeword_is_used() -> None:
    vectors = torch.randn(2, 500, 12)
    vectors[:, :480] *= 1e-3  # nearly all in one heap
    codebooks = fit_codebooks(vectors, subvector_dim=4)
    codes = encode(vectors.unsqueeze(0), codebooks)
    for head in range(2):
        for m in range(3):
            assert len(codes[0, head, :, m].unique()) == 16


def test_k_means_lowers_the_error_and_repeats_itself() -> None:
    vectors = torch.randn(1, 300, 8)

    def error(codebooks: torch.Tensor) -> float:
        subvectors = vectors.unflatten(-1, (-1, 4)).transpose(1, 2)
        return torch.cdist(subvectors, codebooks).amin(-1).square().sum().item()

    state = torch.random.get_rng_state()
    errors = [error(fit_codebooks(vectors, subvector_dim=4, num_iterations=n, seed=1)) for n in (0, 1, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    same, other = (fit_codebooks(vectors, subvector_dim=4, seed=seed) for seed in (1, 2))
    assert torch.equal(fit_codebooks(vectors, subvector_dim=4, seed=1), same)
    assert not torch.equal(other, same)


def test_equal_vectors_are_no_obstacle() -> None:
    codebooks = fit_codebooks(torch.ones(1, 20, 8), subvector_dim=8)
    assert torch.equal(codebooks, torch.ones(1, 1, 16, 8))


def test_refresh_follows_the_vectors() -> None:
    vectors, _ = clusters()
    codebooks = fit_codebooks(vectors, subvector_dim=4)
    before, moved = codebooks.clone(), vectors + 0.5
    refreshed = refresh_codebooks(codebooks, moved)
    assert torch.equal(codebooks, before)
    torch.testing.assert_close(refreshed, before + 0.5, rtol=0, atol=1e-5)  # the same clusters: the means move along
    settled = refresh_codebooks(refreshed, moved)
    torch.testing.assert_close(settled, refreshed, rtol=0, atol=1e-5)
    # A codeword far from everything gets a place among the vectors again.
    refreshed[0, 0, 5] = 1e4
    revived = refresh_codebooks(refreshed, moved)
    assert revived.abs().max() < 100
    assert refresh_codebooks(codebooks.bfloat16(), moved.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("num_vectors", [1, 5, 15])
def test_few_vectors_move_their_own_codewords_only(num_vectors: int) -> None:
    torch.manual_seed(0)
    codebooks, vectors = torch.randn(2, 3, 16, 4), torch.randn(2, num_vectors, 12)
    refreshed = refresh_codebooks(codebooks, vectors, num_iterations=1)
    nearest = encode(vectors.unsqueeze(0), codebooks)[0].long()  # (H, N, M)
    for head in range(2):
        for part in range(3):
            near, subvectors = nearest[head, :, part], vectors[head, :, 4 * part : 4 * part + 4]
            for code in range(16):
                expected = subvectors[near == code].mean(0) if (near == code).any() else codebooks[head, part, code]
                torch.testing.assert_close(refreshed[head, part, code], expected)


def test_weights_of_channels_count_in_codes_and_codebooks() -> None:
    """As plain codes and codebooks of channels times their weights, whose products are exact here."""
    vectors, weights = on_grid(torch.randn(2, 300, 12)), torch.randint(1, 9, (2, 12)) / 4
    codebooks = on_grid(torch.randn(2, 3, 7, 4))
    scales = weights.view(2, 3, 1, 4)
    expected = encode((vectors * weights.unsqueeze(1)).unsqueeze(0), codebooks * scales, impl="torch")
    for impl in ("torch", "cpu"):
        codes = encode(vectors.unsqueeze(0), codebooks, channel_weights=weights, impl=impl)
        assert torch.equal(codes, expected)
        assert not torch.equal(codes, encode(vectors.unsqueeze(0), codebooks, impl=impl))
    scaled = vectors * weights.unsqueeze(1)
    fitted = fit_codebooks(vectors, subvector_dim=4, channel_weights=weights)
    torch.testing.assert_close(fitted * scales, fit_codebooks(scaled, subvector_dim=4))
    refreshed = refresh_codebooks(fitted, vectors + 0.5, channel_weights=weights)
    torch.testing.assert_close(
        refreshed * scales, refresh_codebooks(fitted * scales, (vectors + 0.5) * weights.unsqueeze(1))
    )


VECTORS, BOOKS = torch.randn(1, 2, 3, 8), torch.randn(2, 2, 16, 4)
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (fit_codebooks, {"vectors": torch.randn(2, 50, 12), "subvector_dim": 5}, "subvector_dim is 5, the head size 12"),
    (fit_codebooks, {"vectors": torch.randn(50, 12)}, r"vectors has shape \(50, 12\); expected \(H, N, D\)"),
    (fit_codebooks, {"vectors": torch.randn(2, 15, 8)}, "15 vectors per head for 16 codewords"),
    (fit_codebooks, {"vectors": torch.randn(2, 50, 8), "num_codewords": 17}, "num_codewords is 17; expected 1 to 16"),
    (fit_codebooks, {"vectors": torch.full((2, 50, 8), torch.nan)}, "NaN or infinity"),
    (fit_codebooks, {"vectors": torch.full((2, 50, 8), torch.inf)}, "NaN or infinity"),
    (fit_codebooks, {"vectors": torch.ones(2, 50, 8, dtype=torch.long)}, r"vectors has dtype torch\.int64"),
    (refresh_codebooks, {"codebooks": BOOKS, "vectors": torch.randn(1, 50, 8)}, "the same H"),
    (refresh_codebooks, {"codebooks": BOOKS, "vectors": torch.full((2, 50, 8), torch.nan)}, "NaN or infinity"),
    (encode, {"vectors": torch.randn(1, 3, 3, 8), "codebooks": BOOKS}, "H a multiple of Hkv"),
    (encode, {"vectors": VECTORS, "codebooks": BOOKS, "channel_weights": torch.ones(8)}, "channel_weights has shape"),
    (fit_codebooks, {"vectors": torch.randn(2, 50, 8), "channel_weights": torch.zeros(2, 8)}, "positive numbers"),
    (encode, {"vectors": VECTORS.long(), "codebooks": BOOKS}, r"vectors has dtype torch\.int64"),
    (
        encode,
        {"vectors": VECTORS, "codebooks": BOOKS, "impl": "fast"},
        "impl is 'fast'; expected one of auto, triton, cpu",
    ),
]


def test_bad_arguments_are_refused() -> None:
    for function, arguments, message in REFUSED:
        error = TypeError if "dtype" in message else ValueError
        with pytest.raises(error, match=message):
            function(**arguments)


# The build


@pytest.fixture
def _fresh_library() -> Iterator[None]:
    for cached in (_library, why_not_built):
        cached.cache_clear()
    yield
    for cached in (_library, why_not_built):
        cached.cache_clear()


@pytest.mark.usefixtures("_fresh_library")
def test_without_a_compiler_plain_pytorch_is_used_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    tensors, options = make_inputs(CASES["causal"])
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    expected = sparse_attention(*tensors, **options, impl="reference")
    for _ in range(2):
        output = sparse_attention(*tensors, **options)
        torch.testing.assert_close(output, expected, rtol=0, atol=4e-6)  # float32 rounding
    warnings = [str(w.message) for w in recwarn if "compiled kernels are not available" in str(w.message)]
    assert len(warnings) == 1
    assert "no C++ compiler was found" in warnings[0]
    with pytest.raises(
        RuntimeError, match=r"impl is 'cpu', but the compiled kernels are not available.*use impl='auto'"
    ):
        sparse_attention(*tensors, **options, impl="cpu")


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSEPEFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native.BuildError, match="broken failed: it is broken"):
        native.build_library(SOURCES)
    assert not list((tmp_path / "cache").iterdir())  # nothing half-built is left


def test_an_unwritable_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEPEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.BuildError, match="cannot be written"):
        native.build_library(SOURCES)


def test_the_library_is_built_once_for_its_sources_and_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\necho x >> {log}\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSEPEFT_CACHE", str(tmp_path / "cache"))
    first = native.build_library(SOURCES)
    assert native.build_library(SOURCES) == first
    assert log.read_text() == "x\n"
    compiler.write_text(compiler.read_text().replace("echo 1", "echo 2"))  # another version of it
    assert native.build_library(SOURCES) != first
    assert log.read_text() == "x\nx\n"
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".so", ".so"]  # and no temporary file
