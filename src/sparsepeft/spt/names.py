"""Names by which the options of PEFT's methods call the projections of a sparse FFN.

An FFN that is no module of its own (OPT, BERT) has its projections below the activation once it is sparse. A name that
says in which layer they are then fits the dense model alone, and PEFT would pass over it; and what PEFT finds by itself
("all-linear") fits the sparse model alone, so that the saved adapter would lack these modules on the dense one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from peft import PeftConfig

_OPTIONS = (
    *("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"),
    *("rank_pattern", "alpha_pattern"),
)


def check_names(config: PeftConfig, names: Mapping[str, str]) -> None:
    """See that an adapter's options fit all projections in a sparse model that they fit in the dense one.

    Args:
        config: of one of PEFT's methods.
        names: of the projections, in the sparse model -> in the dense one.

    Raises:
        ValueError: one does not.
    """
    for option in _OPTIONS:
        given = getattr(config, option, None)
        for sparse, dense in names.items():
            said = _said_of(dense, given)
            if said and said != _said_of(sparse, given):
                pairs = zip(reversed(sparse.split(".")), reversed(dense.split(".")), strict=False)
                shared = ".".join(reversed([one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]))
                raise ValueError(
                    f"{option} fits {dense}, but the sparse model calls that {sparse}, which it does not fit; pass the "
                    f"end of the name ({shared!r}), or something that fits both names."
                )


def with_dense_names(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Those of an adapter's options that fit projections in the sparse model alone, changed to fit the dense one, too.

    Args:
        options: of one of PEFT's methods, by name.
        names: of the projections, in the sparse model -> in the dense one.
    """
    changed = {}
    for option in _OPTIONS:
        given = options.get(option)
        said = {dense: _said_of(sparse, given) for sparse, dense in names.items() if not _said_of(dense, given)}
        added = {dense: value for dense, value in said.items() if value}
        if added and given is not None:
            changed[option] = (
                "|".join([f"({given})", *map(re.escape, added)])
                if isinstance(given, str)
                else {**given, **added}
                if isinstance(given, Mapping)
                else sorted({*given, *added})
            )
    return changed


def _said_of(name: str, given: Any) -> Any:
    """What an option says of a module, as PEFT reads it: whether it fits, or a pattern's value; None if nothing."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    if isinstance(given, Mapping):
        return next((value for key, value in given.items() if re.fullmatch(rf"(.*\.)?({key})", name)), None)
    return any(f".{name}".endswith(f".{entry}") for entry in given or ())
