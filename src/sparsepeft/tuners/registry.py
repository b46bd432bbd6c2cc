"""Making this package's methods known to PEFT.

``peft.utils.register_peft_method`` takes only names of its own ``PeftType`` enum, but the mappings it fills accept
any string key; the key needs the enum's ``value``, which some of PEFT's and transformers' code reads.
"""

from __future__ import annotations

from typing import Any

import peft  # noqa: F401 - before a part of it: threads that import both at once must take their locks in one order
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class MethodName(str):
    """The name of a PEFT method outside PEFT's enum, which behaves like a member of it."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    def __str__(self) -> str:
        """As members are printed; ``get_model_status`` reads the name from it."""
        return f"PeftType.{self.value}"


SPARTAN = MethodName("SPARTAN")
HEAD = MethodName("HEAD")
BOTTLENECK = MethodName("BOTTLENECK")
BITFIT = MethodName("BITFIT")


def register(name: MethodName, config_class: type, tuner_class: Any) -> None:
    """Let ``get_peft_model``, ``PeftModel.from_pretrained`` and transformers find a method by its config's type."""
    key: Any = name  # PEFT's annotations say PeftType
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner_class.prefix
