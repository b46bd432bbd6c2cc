"""The adapters at one place in a model."""

from __future__ import annotations

from typing import Any

from torch import nn


class AdapterDict(nn.ModuleDict):
    """Adapters by name, some of which may be hidden from traversals of the model.

    A hidden one is used and deleted like the others (``name in``, ``[name]``, ``del``), but ``modules()``,
    ``parameters()`` and the like skip it. PEFT and PyTorch traverse the model many times for each adapter that is
    added, which takes nearly all of the time once there are hundreds.
    """

    def __init__(self) -> None:
        super().__init__()
        self._aside: dict[str, nn.Module] = {}

    def set_aside(self, name: str) -> None:
        """Hide an adapter from traversals of the model."""
        self._aside[name] = self[name]  # first, so that a pass in another thread always finds it
        del self._modules[name]

    def __contains__(self, name: Any) -> bool:
        return name in self._aside or super().__contains__(name)

    def __getitem__(self, name: str) -> nn.Module:
        return self._aside[name] if name in self._aside else super().__getitem__(name)

    def __delitem__(self, name: str) -> None:
        if name in self._aside:
            del self._aside[name]
        else:
            super().__delitem__(name)

    def clear(self) -> None:
        """Forget all adapters."""
        self._aside.clear()
        super().clear()

    def __bool__(self) -> bool:
        return bool(self._aside) or len(self) > 0
