"""Libraries that come with an extra of the package, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from sparsepeft.errors import UserError

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where the name to install differs from the name to import


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module that ``pip install sparsepeft`` alone does not bring.

    Args:
        module: its full name, such as ``sklearn.metrics``.
        extra: which extra of this package installs it, see ``pyproject.toml``.
        purpose: what needs it; the error's sentence begins with it.

    Returns:
        The module.

    Raises:
        UserError: it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        library = _DISTRIBUTIONS.get(root, root)
        missing = isinstance(error, ModuleNotFoundError) and error.name == root
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        raise UserError(f'{purpose} needs {library}, which {reason}; run pip install "sparsepeft[{extra}]".') from error
