"""The walls between the rooms hold: an import across any of them is reported, and the package as it is keeps them."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from dlm.core.paths import PACKAGE

# Written out once more rather than read from .importlinter, so that a line deleted there is missed here.
FLOORS = (
    ("cli",),
    ("launch",),
    ("collect", "convert"),
    ("submit",),
    ("plan", "report", "train"),
    ("fit", "data", "record"),
    ("core",),
)
SWEEP_HALF = ("cli", "plan", "submit", "collect", "fit", "report", "data", "record", "core")
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"

Pair = tuple[str, str]  # the module that imports, the module that it imports


def climbing() -> list[Pair]:
    """Every import of a room on a higher floor, or of another room on the same floor."""
    pairs: list[Pair] = []
    for above, floor in enumerate(FLOORS):
        higher = [room for rooms in FLOORS[:above] for room in rooms]
        pairs += itertools.product(floor, higher)
        pairs += itertools.permutations(floor, 2)
    return in_dlm(pairs)


def in_dlm(pairs: Iterable[Pair]) -> list[Pair]:
    return [(f"dlm.{importer}", f"dlm.{imported}") for importer, imported in pairs]


WALLS = {
    "floors": climbing(),
    "no-torch": [
        *in_dlm(itertools.product(SWEEP_HALF, ("train", "convert"))),
        *((f"dlm.{room}", library) for room in SWEEP_HALF for library in ("torch", "lightning")),
    ],
    "no-sweeps": in_dlm(itertools.product(("train", "convert"), ("cli", "plan", "submit", "collect", "fit", "report"))),
    "light": [
        (f"dlm.{room}", library)
        for room in ("core", "record", "data", "plan")
        for library in ("pandas", "hydra", "wandb")
    ],
}


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and its contracts."""
    shutil.copytree(PACKAGE, tmp_path / "dlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / ".importlinter", tmp_path)
    return tmp_path


def add_import(copy: Path, importer: str, imported: str) -> None:
    """Let a room of the copy import something: in a new module, or, where the room is one file, at the file's end."""
    room = copy.joinpath(*importer.split("."))
    path = room / "trespass.py" if room.is_dir() else room.with_suffix(".py")
    with path.open("a") as stream:
        stream.write(f"\nimport {imported}\n")


def lint(copy: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and the output of lint-imports on the copy."""
    ended = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", *arguments],
        cwd=copy, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr


def test_the_package_keeps_every_wall(copy):
    code, said = lint(copy)
    assert code == 0 and f"Contracts: {len(WALLS)} kept, 0 broken." in said, said


@pytest.mark.parametrize("wall", WALLS)
def test_an_import_across_a_wall_is_reported(wall, copy):
    for importer, imported in WALLS[wall]:
        add_import(copy, importer, imported)
    code, said = lint(copy, "--contract", wall)
    assert code == 1, said
    unseen = [pair for pair in WALLS[wall] if "{} is not allowed to import {}:".format(*pair) not in said]
    assert not unseen, said
