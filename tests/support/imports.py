"""Read the import graph of a package, including imports inside functions, and find import cycles in it."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """Return the modules of a package, each with the modules of the same package that it imports.

    Imports at the top of a file, inside functions and under TYPE_CHECKING all count. An import counts as an import of
    the named module, or of the module that holds the imported name, but not of its parent packages, although Python
    also runs their ``__init__``. A package that re-exports names with lazy_loader imports nothing itself: importing
    such a name counts as importing the module that the ``.pyi`` file takes the name from. Module names in strings do
    not count.
    """
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    faces = {name: _face(name, path) for name, path in files.items()}
    return {name: set(_imports(name, path, files, faces)) for name, path in files.items()}


def circle(graph: Graph) -> list[str]:
    """Return the modules of an import cycle, beginning and ending with the same module, or an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _face(name: str, path: Path) -> dict[str, str]:
    """Map each name that a lazy package re-exports to the module that defines it."""
    stub = path.with_suffix(".pyi")
    if path.name != "__init__.py" or not stub.exists():
        return {}
    nodes = [node for node in ast.walk(ast.parse(stub.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: _target(node, name) for node in nodes for alias in node.names}


def _target(node: ast.ImportFrom, package: str) -> str:
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _imports(name: str, path: Path, files: dict[str, Path], faces: dict[str, dict[str, str]]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            target = _target(node, package)
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                held = faces.get(target, {}).get(alias.name, target)
                found = inner if inner in files else held
                if found in files:
                    yield found
