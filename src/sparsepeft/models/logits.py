"""A language model's loss without its logits: the head defers them, and cross entropy takes them in chunks.

What a model does between its head and its loss (a softcap, a scale, shifted labels, the number of items in a step) is
written down in its own code, so that code runs as it is. Only the product of the head is put off: the head returns a
:class:`DeferredLogits`, which goes through scaling, tanh, reshaping and slicing by positions, and at which
``F.cross_entropy`` becomes :func:`sparsepeft.ops.linear_cross_entropy`. Whatever else is done to it has the logits
computed at once, as if nothing had been deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepeft.models.onednn import OneDnnLinear
from sparsepeft.ops import linear_cross_entropy
from sparsepeft.ops.linear_cross_entropy import head_logits


class DeferredLogits:
    """Logits of a linear head that are computed when something needs them, (..., V).

    Args:
        hidden: what the head reads, (..., D).
        weight, bias: of the head, (V, D) and (V,).
        scale: factor of the logits.
        softcap: ``softcap * tanh(logits / softcap)`` if not None, see :func:`sparsepeft.ops.linear_cross_entropy`.
        dtype: of the logits; by default that in which the head computes them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale, self.softcap, self.dtype = scale, softcap, dtype or hidden.dtype
        self._computed: Tensor | None = None
        self._needs_gradients, self._version = torch.is_grad_enabled(), self._head_version()

    @property
    def shape(self) -> torch.Size:
        """(..., V)."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def device(self) -> torch.device:
        """Where they will be."""
        return self.hidden.device

    def compute(self) -> Tensor:
        """All of them, computed once; with gradients if the model was called with gradients.

        Raises:
            RuntimeError: the head has changed since then, so they would be others.
        """
        if self._computed is None:
            self._check_head()
            with torch.set_grad_enabled(self._needs_gradients), torch.autocast(self.device.type, enabled=False):
                weight, bias = self.weight.to(self.hidden.dtype), self.bias
                bias = bias if bias is None else bias.to(self.hidden.dtype)
                self._computed = head_logits(self.hidden, weight, bias, self.scale, self.softcap).to(self.dtype)
        return self._computed

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """As ``F.cross_entropy`` of the logits (N, V) and labels (N,)."""
        is_plain = weight is None and size_average is None and reduce is None and not label_smoothing
        is_known = target.dtype == torch.int64 and target.ndim == self.hidden.ndim - 1 == 1
        if not (is_plain and is_known and reduction in ("mean", "sum")):
            return F.cross_entropy(
                self.compute(), target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        self._check_head()
        how: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "ignore_index": ignore_index}
        with torch.set_grad_enabled(self._needs_gradients and torch.is_grad_enabled()):
            loss = linear_cross_entropy(self.hidden, self.weight, target, bias=self.bias, reduction=reduction, **how)
        return loss.to(self.dtype)

    def float(self) -> DeferredLogits:
        """In float32."""
        return self.to(torch.float32)

    def contiguous(self) -> DeferredLogits:
        """Themselves: once computed, they are contiguous."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """In another dtype; on another device they are computed first."""
        if kwargs or len(args) != 1:
            return self.compute().to(*args, **kwargs)
        if isinstance(args[0], torch.dtype):
            return self._changed(dtype=args[0])
        return self if torch.device(args[0]) == self.device else self.compute().to(*args)

    def view(self, *shape: Any) -> Any:
        """With other leading dimensions."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if isinstance(sizes, torch.dtype) or len(sizes) < 2 or sizes[-1] != len(self.weight):
            return self.compute().view(*shape)
        return self._changed(hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> Any:
        """Some positions."""
        indices = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(each, slice) or each is Ellipsis for each in indices):
            return self.compute()[index]
        reaches_last = Ellipsis in indices or len(indices) == self.hidden.ndim
        if reaches_last and indices[-1] is not Ellipsis and indices[-1] != slice(None):
            return self.compute()[index]
        return self._changed(hidden=self.hidden[index])

    def tanh(self) -> Any:
        """The first half of a softcap, whose second is a product."""
        return self.compute().tanh() if self.softcap is not None else self._changed(softcap=1.0)

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)) or factor <= 0:
            return self.compute() * factor
        softcap = self.softcap if self.softcap is None else self.softcap * factor
        return self._changed(scale=self.scale * factor, softcap=softcap)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        is_number = isinstance(divisor, (int, float)) and divisor > 0
        return self * (1 / divisor) if is_number else self.compute() / divisor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and copy look for, no method of a tensor
            raise AttributeError(name)
        return getattr(self.compute(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.compute().__reduce_ex__(protocol)  # copied and pickled as what they stand for

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch's functions that are given one of these."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            if function is F.cross_entropy and len(args) > 1:
                return args[0].cross_entropy(*args[1:], **kwargs)
            if function is torch.tanh and not kwargs:
                return args[0].tanh()
        return function(*map(_computed, args), **{name: _computed(value) for name, value in kwargs.items()})

    def _changed(self, **values: Any) -> DeferredLogits:
        names = ("hidden", "weight", "bias", "scale", "softcap", "dtype")
        changed = DeferredLogits(**{name: getattr(self, name) for name in names} | values)
        changed._needs_gradients, changed._version = self._needs_gradients, self._version
        return changed

    def _head_version(self) -> list[int]:
        """Grows with each change of the head; tensors made in inference mode have no count of changes."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [tensor._version for tensor in tensors if not tensor.is_inference()]

    def _check_head(self) -> None:
        if self._head_version() != self._version:
            raise RuntimeError(
                "Logits were read after the model's head had changed, as by optimizer.step(), but deferred_logits "
                "computes them when they are read; read them before the step, or call the model outside the context."
            )


def _add_arithmetic() -> None:
    """Operators, which Python looks up on the class, of the logits computed."""
    for name in (
        *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "pow", "rpow", "matmul", "rmatmul", "neg"),
        *("abs", "setitem", "eq", "ne", "lt", "le", "gt", "ge", "bool", "iter"),
    ):

        def method(self: DeferredLogits, *args: Any, name: str = f"__{name}__") -> Any:
            return getattr(self.compute(), name)(*map(_computed, args))

        setattr(DeferredLogits, f"__{name}__", method)


_add_arithmetic()


def _computed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_computed, value))
    return value.compute() if isinstance(value, DeferredLogits) else value


class _Deferring(nn.Linear):
    """Before a linear head's own class."""

    _is_always: bool

    def forward(self, input: Tensor) -> Any:
        # A graph has tensors only. Without gradients, callers (as Trainer in evaluation) collect the logits.
        if torch.compiler.is_compiling() or not (self._is_always or torch.is_grad_enabled()):
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return DeferredLogits(input, self.weight, self.bias)


@cache
def _deferring(head: Any, always: bool) -> type[nn.Linear]:
    return type(f"Deferring{head.__name__}", (_Deferring, head), {"_is_always": always})


@contextmanager
def deferred_logits(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Inside, a language model that is given labels computes its loss without all of its logits at once.

    The loss and its gradients are the model's own, whether it is a plain model, with an adapter, sparse, or wrapped for
    several processes. Its output has :class:`DeferredLogits`, which are computed when something asks for them; they
    must be read before the head changes. It has an effect where the head is a plain ``nn.Linear`` (or PEFT's trained
    copy of one); with a quantized head, LoRA on the head, in a compiled graph or under ``nn.DataParallel`` the model
    computes its logits as ever.

    Args:
        model: a language model.
        always: also where gradients are off. There the model computes its logits as ever by default, as whoever
            evaluates (``Trainer`` with ``compute_metrics``) expects tensors; pass True where the loss alone is read.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=99)), torch.randint(99, (2, 7))
        >>> with deferred_logits(model):
        ...     model(input_ids=ids, labels=ids).loss.backward()
    """
    heads = () if isinstance(model, nn.DataParallel) else tuple(_linear_heads(model))
    classes: list[Any] = [type(head) for head in heads]
    for head, its_class in zip(heads, classes, strict=True):
        head.__class__ = _deferring(its_class, always)
    try:
        yield
    finally:
        for head, its_class in zip(heads, classes, strict=True):
            head.__class__ = its_class


def _linear_heads(model: nn.Module) -> Iterator[nn.Linear]:
    language_model = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    head = None if language_model is None else language_model.get_output_embeddings()
    for module in () if head is None else head.modules():
        if type(module) in (nn.Linear, OneDnnLinear) and "forward" not in vars(
            module
        ):  # else something has its hands on it
            yield module


def language_model_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of a causal language model, without all of its logits at once; see :func:`deferred_logits`.

    Args:
        model: plain, sparse, or with an adapter.
        input_ids: (B, T).
        labels: (B, T), not shifted, -100 where a token does not count; by default the tokens themselves, where
            the ``attention_mask`` is 0 neither for them nor for the token before, which predicts them.
        attention_mask: (B, T).
        kwargs: further arguments of the model, such as ``num_items_in_batch`` (tokens that the sum is divided by).

    Returns:
        A scalar: the mean over predicted tokens, or the sum divided by ``num_items_in_batch``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=99))
        >>> language_model_loss(model, torch.randint(99, (2, 7))).backward()
    """
    if labels is None:
        labels = next_token_labels(input_ids, attention_mask)
    with deferred_logits(model, always=True):
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False, **kwargs)
    loss: Tensor = output.loss
    return loss


def next_token_labels(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The labels of a causal language model that predicts its own input, (B, T), not shifted.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T) or None. The label is -100 where it is 0, and behind such a token: padding on the left
            predicts nothing.
    """
    if attention_mask is None:
        return input_ids
    counts = attention_mask != 0
    counts[:, 1:] = counts[:, 1:] & counts[:, :-1]
    return input_ids.masked_fill(~counts, -100)
