"""Makes the package's PEFT methods known to PEFT in processes that do not import ``sparsepeft``.

The installed file ``sparsepeft.pth`` calls :func:`install` whenever Python starts; so this is a module of its own, and
it imports nothing. It waits until ``peft.mapping`` has been imported, and then adds to PEFT's registry of configs what
imports the package as soon as one of its adapters is loaded. ``SPARSEPEFT_AUTOLOAD=0`` in the environment switches it
off.
"""

import sys

TYPE_CHECKING = False  # importing `typing`, or `annotations` from `__future__`, would take longer than all of this
if TYPE_CHECKING:
    from typing import Any

METHODS = ("SPARTAN", "BOTTLENECK", "BITFIT", "HEAD")
_REGISTRY = "peft.mapping"


class DeferredConfig:
    """Stands for a config class in PEFT's registry until it is used; importing the package then replaces it."""

    def __init__(self, name: "str", registry: "dict[str, Any]") -> None:
        self._name, self._registry = name, registry

    def __call__(self, **values: "Any") -> "Any":
        """A config, as PEFT makes it from a file's values."""
        return self._config_class().from_peft_type(**values)

    def __getattr__(self, attribute: "str") -> "Any":
        if attribute.startswith("__"):  # for those who only look at the object
            raise AttributeError(attribute)
        return getattr(self._config_class(), attribute)

    def _config_class(self) -> "Any":
        import sparsepeft.tuners  # noqa: F401 - registers its methods

        return self._registry[self._name]


class _Loader:
    """The loader of PEFT's registry, and what follows it."""

    def __init__(self, loader: "Any") -> None:
        self._loader = loader

    def __getattr__(self, attribute: "str") -> "Any":
        return getattr(self._loader, attribute)

    def create_module(self, spec: "Any") -> "Any":
        return self._loader.create_module(spec)

    def exec_module(self, module: "Any") -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # as if it had not been wrapped
        self._loader.exec_module(module)
        register(module)


class _Finder:
    """Leaves finding to the others on ``sys.meta_path``, and wraps the loader of PEFT's registry."""

    def find_spec(self, name: "str", path: "Any" = None, target: "Any" = None) -> "Any":
        if name != _REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec: Any = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def register(module: "Any") -> None:
    """Add the methods to the registry of configs that ``module`` (``peft.mapping``) holds; what is there stays."""
    registry = getattr(module, "PEFT_TYPE_TO_CONFIG_MAPPING", {})
    for name in METHODS:
        registry.setdefault(name, DeferredConfig(name, registry))


def install() -> None:
    """Wait for PEFT, or register at once if it has been imported already."""
    if _REGISTRY in sys.modules:
        register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
