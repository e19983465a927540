"""Read which modules of a package import which others, wherever the import stands, and find circles among them."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """The modules of a package, and the modules of the same package that each imports.

    An import counts at the top of a file, inside a function and under TYPE_CHECKING alike. It counts as an import of
    the module that is named, or that holds the name; not of the packages above it, although Python runs their
    ``__init__`` too. A package whose names are handed on by lazy_loader imports nothing itself: an import of one of its
    names counts as an import of the module that its ``.pyi`` file takes the name from. Names of modules in strings are
    not seen.
    """
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    faces = {name: _face(name, path) for name, path in files.items()}
    return {name: set(_imports(name, path, files, faces)) for name, path in files.items()}


def circle(graph: Graph) -> list[str]:
    """Some modules that import each other in a circle, the first of them twice; empty if there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _face(name: str, path: Path) -> dict[str, str]:
    """The names that a lazy package hands on, and the module that each comes from."""
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
