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


def test_interpreter_runs_a_kernel_shows_skipped_elements_and_raises_failures_here() -> None:
    assert torch.equal(interpreted(launch_sum, 4, 16, 4), torch.full((4,), 16.0))
    assert interpreted(torch.empty, 3).isnan().all()
    with pytest.raises(ZeroDivisionError):
        interpreted(divmod, 1, 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_assembler_reads_the_log(capability: int) -> None:
    (kernel,) = assert_assembles(launch_sum, 4, 128, 4, capability=capability)
    assert kernel.name == "_sum_kernel"
    assert 0 < kernel.registers < 255


def test_spills_and_no_launch_are_errors() -> None:
    # 32 threads hold 32 x 512 numbers: 512 each, of which 255 fit.
    with pytest.raises(AssertionError, match="registers spill"):
        assert_assembles(launch_sum, 32, 512, 1, capability=90)
    with pytest.raises(AssertionError, match="launched no"):
        assert_assembles(int, capability=90)
