"""Which package may import which: downwards, in no circle, and nothing that another keeps to itself."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
# Of the library's packages each imports only from those before it; "" are the modules beside them.
LAYERS = (
    *("", "ops", "models", "layers", "tuners", "storage", "planning", "spt", "rows", "tasks", "methods", "runs"),
    *("inference", "scoring", "bulk", "generation", "export", "inspection", "training", "comparison", "sweeps"),
)
ABOVE = {("sparsepeft_serve", "sparsepeft"), ("sparsepeft_research", "sparsepeft")}
MAX_LINES = 3_000


def name_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


def package_of(module: str) -> str:
    """The folder directly below one of those in ``src``, or that one, for the modules beside such folders."""
    top, *below = module.split(".")
    return f"{top}.{below[0]}" if below and (SOURCE / top / below[0]).is_dir() else top


def imported_by(module: str) -> Iterator[str]:
    """Modules of ours that a module imports, in functions too, or names in a string."""
    file = MODULES[module]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if file.name == "__init__.py" else -1]
                base = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [base])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names = [node.value]
        yield from (name for name in names if name in MODULES)


def imports() -> Iterator[tuple[str, str]]:
    """Modules and what they import from other packages; what ``import sparsepeft`` itself exports is no import."""
    for module in MODULES.keys() - {"sparsepeft", "sparsepeft_autoload"}:
        for name in sorted(set(imported_by(module))):
            if package_of(name) != package_of(module):
                yield module, name


IMPORTS = sorted(imports())


def test_imports_point_downwards() -> None:
    def layer(module: str) -> int:
        return LAYERS.index(package_of(module).partition(".")[2])

    wrong = []
    for module, name in IMPORTS:
        top, other = module.partition(".")[0], name.partition(".")[0]
        if top == other == "sparsepeft":
            good = name == "sparsepeft" or layer(name) < layer(module)
        else:
            good = top in (other, "sparsepeft_cli") or (top, other) in ABOVE
        if not good:
            wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for module, name in IMPORTS:
        edges.setdefault(package_of(module), set()).add(package_of(name))
    tuple(graphlib.TopologicalSorter(edges).static_order())  # a CycleError names one


def test_no_module_with_an_underscore_is_imported_from_another_package() -> None:
    wrong = [f"{module} imports {name}" for module, name in IMPORTS if "._" in name]
    assert not wrong, "\n".join(wrong)


def test_no_package_is_large() -> None:
    lines: dict[str, int] = {}
    for module, file in MODULES.items():
        package = package_of(module)
        if package.startswith("sparsepeft_research"):  # whose folders have folders
            package = name_of(file.parent / "__init__.py")
        lines[package] = lines.get(package, 0) + len(file.read_text(encoding="utf-8").splitlines())
    large = {package: number for package, number in lines.items() if number > MAX_LINES and package != "sparsepeft.ops"}
    assert not large, large
