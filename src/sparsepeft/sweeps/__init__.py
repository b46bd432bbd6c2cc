"""Sweeps on Ray Tune: trials of a space, stopped early, resumed, ranked; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.sweeps.report import Sweep
    from sparsepeft.sweeps.running import SweepOptions, plan_sweep, sweep
    from sparsepeft.sweeps.space import Space, Trial, read_space

__all__ = ["Space", "Sweep", "SweepOptions", "Trial", "plan_sweep", "read_space", "sweep"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.sweeps.report": ("Sweep",),
        "sparsepeft.sweeps.running": ("SweepOptions", "plan_sweep", "sweep"),
        "sparsepeft.sweeps.space": ("Space", "Trial", "read_space"),
    },
)
