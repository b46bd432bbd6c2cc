"""Configuration of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.activations import ACT2FN

from sparsepeft.errors import unknown_name
from sparsepeft.tuners.config import TaskAdapterConfig, require_choice, require_positive
from sparsepeft.tuners.registry import BOTTLENECK

STYLES = ("pfeiffer", "houlsby")
_NON_LINEARITY = {"pfeiffer": "relu", "houlsby": "silu"}


@dataclass(repr=False)
class BottleneckConfig(TaskAdapterConfig):
    """Bottleneck adapters inside each Transformer layer, equal to those of AdapterHub's ``adapters`` 1.3.0.

    ``"pfeiffer"`` (its ``seq_bn``) has one adapter a layer, after the FFN; ``"houlsby"`` (``double_seq_bn``) two, after
    self-attention and after the FFN. With h a sublayer's output after dropout, x its residual input and LN the layer's
    own frozen norm behind the sum:

    - pfeiffer: ``LN(h + x + A(LN(h + x)))``; without such a norm (pre-LN models) ``h + x + A(h + x)``
    - houlsby: ``LN(x + h + A(h))``; in pre-LN models ``x + h + A(h)``

    Where a model applies dropout to h as a function and not as a module (BART, OPT, Whisper), Houlsby's adapter stands
    before that dropout instead of behind it, which differs in training alone.

    Args:
        style: ``"pfeiffer"`` or ``"houlsby"``.
        reduction_factor: the bottleneck is ``hidden_size // reduction_factor`` wide, at least 1.
        non_linearity: activation by its name in transformers; None is ReLU for pfeiffer, SiLU ("swish") for houlsby.
        initializer_range: standard deviation of fresh weights; a fresh adapter is therefore no identity.
        attention_module: for houlsby, the module in each layer that gives the attention sublayer's h; None finds it.
        ffn_module: the same for the FFN sublayer.
        (and those of :class:`sparsepeft.tuners.config.TaskAdapterConfig`)

    Raises:
        ValueError: a value is out of range or a name is unknown.

    Example:
        >>> config = BottleneckConfig(style="houlsby", reduction_factor=16, task_type="SEQ_CLS")
    """

    style: str = field(default="pfeiffer", metadata={"help": "'pfeiffer' or 'houlsby'."})
    reduction_factor: float = field(default=12, metadata={"help": "Hidden size over bottleneck."})
    non_linearity: str | None = field(default=None, metadata={"help": "Activation in the bottleneck."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of fresh weights."})
    attention_module: str | None = field(default=None, metadata={"help": "Where attention's output leaves a layer."})
    ffn_module: str | None = field(default=None, metadata={"help": "Where the FFN's output leaves a layer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        require_choice("style", self.style, STYLES)
        require_positive("reduction_factor", self.reduction_factor, integer=False)
        if self.non_linearity is None:
            self.non_linearity = _NON_LINEARITY[self.style]
        if self.non_linearity not in ACT2FN:
            raise ValueError(unknown_name("non_linearity", str(self.non_linearity), sorted(ACT2FN)))
        if not isinstance(self.initializer_range, (int, float)) or self.initializer_range < 0:
            raise ValueError(
                f"initializer_range={self.initializer_range!r} was given, but it must be zero or a positive number."
            )

    def bottleneck_size(self, hidden_size: int) -> int:
        """The width of the middle for a layer of ``hidden_size``."""
        return max(1, int(hidden_size // self.reduction_factor))

    def parameter_formula(self, hidden_sizes: list[int]) -> tuple[str, int]:
        """The closed formula for the adapters' parameters, written out, and its value.

        Args:
            hidden_sizes: the width of each layer that gets adapters.
        """
        places = 1 if self.style == "pfeiffer" else 2
        count = places * sum(2 * d * self.bottleneck_size(d) + self.bottleneck_size(d) + d for d in hidden_sizes)
        symbols, before = ("(2db+b+d)L", "") if places == 1 else ("2(2db+b+d)L", "2·")
        if len(set(hidden_sizes)) != 1:
            return f"{symbols.removesuffix('L')} over all layers = {count:,}", count
        d, b = hidden_sizes[0], self.bottleneck_size(hidden_sizes[0])
        return f"{symbols} = {before}(2·{d}·{b}+{b}+{d})·{len(hidden_sizes)} = {count:,}", count
