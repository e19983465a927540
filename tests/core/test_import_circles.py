"""No two modules of dlm import each other, not even indirectly, in a function or for types only."""

from pathlib import Path

import pytest
from support.imports import circle, import_graph

import dlm


def test_no_modules_import_each_other_in_a_circle():
    graph = import_graph(Path(dlm.__file__).parent)
    assert len(graph) > 100
    assert "dlm.fit.optimum" in graph["dlm.fit.plot"]  # an import from a function is among them
    assert circle(graph) == []


INNER = {
    "at the top": "from house.b import f",
    "in a function": "def g():\n    from house.b import f\n    return f",
    "for types only": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.b import f",
    "as a module": "import house.b",
    "from its package": "from house import b",
    "relative": "from .b import f",
    "through a lazy face": "from house.room import f",
}


@pytest.mark.parametrize("text", INNER.values(), ids=INNER.keys())
def test_a_circle_is_found_wherever_the_import_stands(tmp_path, text):
    house = tmp_path / "house"
    (house / "room").mkdir(parents=True)
    (house / "__init__.py").write_text("")
    (house / "room" / "__init__.py").write_text("import lazy_loader\n")
    (house / "room" / "__init__.pyi").write_text("from ..b import f as f\n")
    (house / "b.py").write_text("from house.c import g\n\n\ndef f():\n    return g\n")
    (house / "c.py").write_text("g = 1\n")
    (house / "a.py").write_text(text + "\n")
    graph = import_graph(house)
    assert graph["house.a"] == {"house.b"} and circle(graph) == []
    (house / "c.py").write_text("from house.a import f\n\ng = f\n")
    assert set(circle(import_graph(house))) == {"house.a", "house.b", "house.c"}


def test_a_module_that_imports_itself_is_a_circle(tmp_path):
    house = tmp_path / "house"
    house.mkdir()
    (house / "__init__.py").write_text("")
    (house / "a.py").write_text("from house import a\n")
    assert circle(import_graph(house)) == ["house.a", "house.a"]
