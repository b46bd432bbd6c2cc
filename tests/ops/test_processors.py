"""Compiled kernels for other processors than the one at hand, and what is measured to choose among forms."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sparsepeft.ops import sparse_attention
from sparsepeft.ops.measured import fastest
from sparsepeft.ops.sparse_attention import cpu

TESTS = Path(__file__).parent


@pytest.mark.slow  # builds the kernels, and runs their tests in a process of its own
@pytest.mark.parametrize(  # 256 and 128 bits; this machine's own run anyway
    ("processor", "tests"),
    [
        ("x86-64-v3", "cpu or dropout"),
        ("x86-64-v2", "dropout or cpu and (match_reference or matches_reference or trains or edges or subvectors)"),
    ],
)
def test_kernels_for_narrower_vectors_match_the_reference(processor: str, tests: str, tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{processor} is no processor of {platform.machine()}")
    flags = Path("/proc/cpuinfo").read_text()
    if processor == "x86-64-v3" and not ("avx2" in flags and "avx512f" in flags):
        pytest.skip("this processor has no AVX2, or no wider vectors, so that these are its own kernels")
    files = [
        str(TESTS / f"test_{name}.py")
        for name in ("memory", "dropout", "sparse_attention", "sparse_attention_selection")
    ]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", tests, *files],
        env={**os.environ, "SPARSEPEFT_CPU": processor, "SPARSEPEFT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert len(list(tmp_path.glob("*.so"))) == 3  # it was these kernels that ran


def test_gradients_do_not_depend_on_how_many_threads_share_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that share one head's keys add up in order, in one tensor: equal sums each time, no copy per thread."""
    query, key, value = (torch.randn(1, heads, 300, 16) for heads in (3, 1, 1))
    codebooks, grad = torch.randn(1, 2, 4, 8), torch.randn(1, 3, 300, 16)

    def gradients(num_parts: int, dtype: torch.dtype, granularity: str) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(cpu, "_num_parts", lambda *_: num_parts)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        options = {"top_l": 50, "causal": True, "granularity": granularity, "block_size": 16, "impl": "cpu"}
        output = sparse_attention(*leaves, codebooks, **options)
        return torch.autograd.grad(output, leaves, grad.to(dtype))

    for granularity in ("token", "block"):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            alone = gradients(1, dtype, granularity)
            for num_parts in (2, 5, 64):  # more parts than threads, and than blocks of queries
                shared = gradients(num_parts, dtype, granularity)
                assert all(map(torch.equal, shared, gradients(num_parts, dtype, granularity)))
                torch.testing.assert_close(shared, alone, rtol=tolerance, atol=tolerance)


def test_parts_keep_all_threads_at_work_and_are_few() -> None:
    for groups in range(1, 40):
        for threads in range(1, 70):
            num_parts = cpu._num_parts(groups, threads)
            items = groups * num_parts
            assert items % threads == 0 or items >= 4 * threads
            assert num_parts == 1 or groups * (num_parts - 1) < 4 * threads


PROGRAM = """
import os, signal, torch
from sparsepeft.ops import memory_read, sparse_attention

def num_threads():
    return len(os.listdir("/proc/self/task"))

def run():
    with torch.no_grad():
        memory_read(x, *memory, top_k=8, impl="cpu")
        return sparse_attention(query, query, query, codebooks, top_l=16, impl="cpu")

x, memory = torch.randn(512, 64), [torch.randn(16, 64), torch.randn(16, 3, 64), torch.randn(16, 3, 64)]
query, codebooks = torch.randn(1, 4, 128, 16), torch.randn(4, 2, 16, 8)
torch.set_num_threads(3)
torch.randn(4000, 1000).softmax(-1)
before = num_threads()
expected = run()
assert num_threads() == before, (num_threads(), before)
torch.set_num_threads(2)
run()
assert num_threads() <= before
child = os.fork()
if not child:  # its parent's threads are gone
    signal.alarm(60)
    os._exit(0 if torch.equal(run(), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow  # a process of its own
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_kernels_run_on_the_threads_of_torch_and_start_none() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


def test_kernels_run_in_threads_that_torch_does_not_know() -> None:
    tensors = [torch.randn(1, 2, 64, 16) for _ in range(3)]
    codebooks, outputs = torch.randn(2, 2, 4, 8), []
    threads = [
        threading.Thread(target=lambda: outputs.append(sparse_attention(*tensors, codebooks, top_l=8, impl="cpu")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_fastest_form_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEPEFT_CACHE", str(tmp_path))
    calls: list[str] = []
    wait = threading.Event()
    forms = {"slow": lambda: (calls.append("slow"), wait.wait(0.02)), "quick": lambda: calls.append("quick")}
    assert next(iter(fastest("op", (1, 2), forms))) == "quick"
    assert set(calls) == {"slow", "quick"}
    calls.clear()
    assert next(iter(fastest("op", (1, 2), forms))) == "quick"
    assert not calls
    fastest("op", (1, 3), forms)  # other sizes are measured by themselves
    assert calls
    for file in (tmp_path / "measured").iterdir():
        file.write_text("{")  # cut short
    calls.clear()
    assert next(iter(fastest("op", (1, 2), forms))) == "quick"
    assert calls
    monkeypatch.setenv("SPARSEPEFT_CACHE", "/proc/nowhere")
    assert next(iter(fastest("op", (1, 2), forms))) == "quick"
