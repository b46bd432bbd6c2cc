"""A bottleneck adapter as a module."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN


class BottleneckAdapter(nn.Module):
    r"""``A(x) = W_up act(W_down x + b_down) + b_up``, without the residual, which differs between the styles.

    Source: Houlsby et al. (arXiv:1902.00751), Pfeiffer et al. (arXiv:2005.00247), as built by AdapterHub's ``adapters``
    1.3.0: weights N(0, ``initializer_range``), biases zero. Differs: nothing.

    Args:
        hidden_size: width D of the states.
        bottleneck_size: width of the middle.
        non_linearity: name of the activation, as in ``transformers.activations.ACT2FN``.
        initializer_range: standard deviation of both weights.

    Shapes:
        forward (..., D) -> (..., D).
    """

    def __init__(
        self, hidden_size: int, bottleneck_size: int, non_linearity: str = "relu", initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.activation = ACT2FN[non_linearity]
        self.up = nn.Linear(bottleneck_size, hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        for linear in (self.down, self.up):
            linear.weight.normal_(std=self.initializer_range)
            linear.bias.zero_()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D), in the dtype of ``hidden_states``."""
        adapted: torch.Tensor = self.up(self.activation(self.down(hidden_states.to(self.down.weight.dtype))))
        return adapted.to(hidden_states.dtype)
