"""Which implementation of an operator runs, and why.

Implementations have the same names in every operator:

=============  ======================================================================
``reference``  the definition, equation for equation; the others are tested against it
``torch``      portable PyTorch, on every device and in every dtype
``cpu``        C++ kernels, compiled at first use
``triton``     Triton kernels for GPUs
``flex``       FlexAttention, for blocks of sparse attention on GPUs
=============  ======================================================================

``impl="auto"`` takes the one of highest priority that can run with the arguments; :func:`explain` says which that is
and why the others are not. Two variables of the environment, read at import, change what "auto" may take:
``SPARSEPEFT_DISABLE=cpu,triton`` turns implementations off, and ``SPARSEPEFT_ENABLE=triton`` lets kernels be chosen on
hardware on which nobody has run them yet.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from sparsepeft.errors import UserError

ArgumentsT = TypeVar("ArgumentsT")

# Former names, which differed from operator to operator.
RENAMED = {"masked": "torch", "selected": "torch", "looped": "torch", "grouped_mm": "torch", "compiled": "cpu"}
_OPTIONAL = ("cpu", "triton", "flex")  # "torch" and "reference" always remain


def _read_names(variable: str) -> frozenset[str]:
    names = frozenset(os.environ.get(variable, "").lower().replace(",", " ").split())
    if unknown := names - set(_OPTIONAL):
        raise UserError(
            f"The environment variable {variable} names {', '.join(sorted(unknown))}; expected some of "
            f"{','.join(_OPTIONAL)}, as torch and reference always remain."
        )
    return names


DISABLED = _read_names("SPARSEPEFT_DISABLE")
ENABLED = _read_names("SPARSEPEFT_ENABLE")


def _never(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation(Generic[ArgumentsT]):
    """One way to compute an operator.

    Attributes:
        name: as in the table above.
        priority: of those that can run, "auto" takes the one with the highest.
        merit: what speaks for it, a sentence.
        why_unavailable: why this machine does not have it, or None; the answer does not change while a program runs.
        why_not: why it cannot take the arguments, or None. Traced by ``torch.compile``, so the text may not hold sizes
            that can be symbolic there.
        why_not_automatic: why "auto" does not take it though it could run: slower here, or never run on such hardware.
    """

    name: str
    priority: int
    merit: str
    why_unavailable: Callable[[], str | None] = _never
    why_not: Callable[[ArgumentsT], str | None] = _never
    why_not_automatic: Callable[[ArgumentsT], str | None] = _never

    def why_skipped(self, arguments: ArgumentsT) -> str | None:
        """Return why "auto" does not take it, or None."""
        if self.name in DISABLED:
            return "SPARSEPEFT_DISABLE turns it off"
        # Whether a kernel can be built, which may take seconds, is asked only where it would be used.
        return self.why_not(arguments) or self.why_unavailable() or self.why_not_automatic(arguments)


class Explanation(NamedTuple):
    """What ``impl="auto"`` means for some arguments."""

    impl: str
    reason: str  # why it was chosen
    others: dict[str, str]  # why each of the others was not

    def __str__(self) -> str:
        return "\n".join([f"{self.impl}: {self.reason}", *(f"not {name}: {why}" for name, why in self.others.items())])


class Operator(Generic[ArgumentsT]):
    """The implementations of an operator.

    Args:
        name: of the public function.
        bind: turns the arguments of the public function into those that implementations are asked about.
        implementations: one takes every argument.
    """

    def __init__(
        self, name: str, bind: Callable[..., ArgumentsT], implementations: Sequence[Implementation[ArgumentsT]]
    ) -> None:
        self.name, self.bind = name, bind
        self._ranked = sorted(implementations, key=lambda implementation: -implementation.priority)
        self._named = {implementation.name: implementation for implementation in self._ranked}
        OPERATORS[name] = self

    def choose(self, impl: str, arguments: ArgumentsT) -> str:
        """Return the name of the implementation that ``impl`` means for the arguments.

        Raises:
            ValueError: ``impl`` is unknown, turned off, or cannot take the arguments.
            RuntimeError: this machine does not have it.
        """
        if impl == "auto":
            for implementation in self._ranked:
                if implementation.why_skipped(arguments) is None:
                    return implementation.name
        implementation = self._named_or_raise(impl)
        if impl in DISABLED:
            raise ValueError(f"impl is {impl!r}, but SPARSEPEFT_DISABLE turns it off: unset that, or use impl='auto'.")
        reason = implementation.why_not(arguments)
        if reason is not None:
            raise ValueError(f"impl is {impl!r}, but {reason}: use impl='auto'.")
        reason = implementation.why_unavailable()
        if reason is not None:
            raise RuntimeError(f"impl is {impl!r}, but {reason}: use impl='auto'.")
        return impl

    def means(self, name: str, impl: str, arguments: ArgumentsT) -> bool:
        """Return whether ``impl`` means ``name``, which must be the only one that "auto" takes for such arguments.

        Unlike :meth:`choose` it asks no other implementation, so ``torch.compile`` can trace it.

        Raises:
            ValueError, RuntimeError: as :meth:`choose`.
        """
        if impl == "auto":
            return self._named[name].why_skipped(arguments) is None
        self._named_or_raise(impl)
        return impl == name and self.choose(impl, arguments) == name

    def explain(self, arguments: ArgumentsT) -> Explanation:
        """Return what "auto" means for the arguments."""
        chosen = self._named[self.choose("auto", arguments)]
        others = {
            other.name: other.why_skipped(arguments) or f"{chosen.name} comes before it"
            for other in self._ranked
            if other is not chosen
        }
        return Explanation(chosen.name, chosen.merit, others)

    def _named_or_raise(self, impl: str) -> Implementation[ArgumentsT]:
        if impl in self._named:
            return self._named[impl]
        new_name = RENAMED.get(impl)
        hint = f"; it is called {new_name!r} now" if new_name in self._named else ""
        raise ValueError(f"impl is {impl!r}{hint}; expected one of {', '.join(['auto', *self._named])}.")


OPERATORS: dict[str, Operator[Any]] = {}


def explain(operator: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Return which implementation ``impl="auto"`` takes for a call of an operator, and why not the others.

    Args:
        operator: ``memory_read``, ``product_memory_read``, ``sparse_attention``, ``encode``, ``routed_ffn``,
            ``exact_ffn`` or ``linear_cross_entropy``, or its name.
        args, kwargs: the arguments of the call; nothing is computed with them.

    Raises:
        ValueError: ``operator`` is no operator of this package.
        TypeError: the function takes no such arguments.

    Example:
        >>> import torch
        >>> from sparsepeft.ops import memory_read
        >>> x = torch.randn(2, 7, 32)  # (B, T, D)
        >>> parent_keys, child_keys, child_values = torch.randn(16, 32), torch.randn(16, 3, 32), torch.zeros(16, 3, 32)
        >>> explanation = explain(memory_read, x, parent_keys, child_keys, child_values, top_k=8)
        >>> sorted([explanation.impl, *explanation.others])  # print(explanation) says why it is the first
        ['cpu', 'reference', 'torch', 'triton']
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    if name not in OPERATORS:
        raise ValueError(f"operator is {name!r}; expected one of {', '.join(OPERATORS)}.")
    if callable(operator):
        inspect.signature(operator).bind(*args, **kwargs)  # names what is missing, or what there is not
    return OPERATORS[name].explain(OPERATORS[name].bind(*args, **kwargs))
