"""The harness for Triton kernels must notice what it is there to notice."""

from __future__ import annotations

import pytest
import torch
from tests.ops.triton_aot import CAPABILITIES, assert_assembles, interpreted, needs_triton

pytestmark = needs_triton


def launch_sum(rows: int, columns: int, num_warps: int) -> torch.Tensor:
    from tests.ops.triton_example import _sum_kernel

    x, y = torch.ones(rows, columns), torch.empty(rows)
    _sum_kernel[(1,)](x, y, rows, columns, ROWS=rows, COLUMNS=columns, num_warps=num_warps)
    return y


def launch_nothing() -> None:
    pass


def test_interpreter_runs_a_kernel() -> None:
    assert torch.equal(interpreted(launch_sum, 4, 16, 4), torch.full((4,), 16.0))


def test_interpreter_shows_skipped_elements() -> None:
    assert interpreted(torch.empty, 3).isnan().all()


def test_failures_in_the_interpreter_are_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        interpreted(divmod, 1, 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_assembler_reads_the_log(capability: int) -> None:
    (kernel,) = assert_assembles(launch_sum, 4, 128, 4, capability=capability)
    assert kernel.name == "_sum_kernel"
    assert 0 < kernel.registers < 255


def test_spills_are_an_error() -> None:
    # 32 threads hold 32 x 512 numbers: 512 each, of which 255 fit.
    with pytest.raises(AssertionError, match="registers spill"):
        assert_assembles(launch_sum, 32, 512, 1, capability=90)


def test_assembling_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="launched no"):
        assert_assembles(launch_nothing, capability=90)
