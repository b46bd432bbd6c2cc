"""The command line, in processes that hold parts of each weight (FSDP2) on a CPU.

accelerate shards on accelerators alone; what it is told here makes it do on the CPU what it does there.
"""

from __future__ import annotations

import accelerate

from sparsepeft.training import processes
from sparsepeft_cli import main

_connect = processes.PartialState


def _connected(*args: object, **kwargs: object) -> accelerate.PartialState:
    state = _connect(*args, **kwargs)
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
    return state


if __name__ == "__main__":
    processes.PartialState = _connected
    main()
