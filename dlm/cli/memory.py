"""Remember what the last report of a sweep was made from and what it said, to print it again if nothing changed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dlm.core.errors import UserError
from dlm.core.files import write_json
from dlm.core.paths import PACKAGE, configs_dir
from dlm.core.typed import read_typed
from dlm.submit.snapshot import content_hash_of

PAGE = "report/report.html"
FIGURES = "report/figures"
MEMORY = "report/source.json"
SOURCES = ("plan.json", "runs.csv", "excluded.csv", "proof.json")
LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib", "jinja2")


def remember(folder: Path, said: Sequence[str]) -> None:
    """Write down the lines that a report printed, and what it was made from."""
    write_json(folder / MEMORY, {"sources": _sources(folder), "said": list(said)})


def said_before(folder: Path) -> list[str] | None:
    """Return the lines that the last report printed; None if there is none that was made from the present sources."""
    if not all((folder / name).is_file() for name in (MEMORY, PAGE, "fits.json")):
        return None
    with contextlib.suppress(UserError):  # a damaged memory is made anew
        memory = read_typed(folder / MEMORY, _Memory)
        if memory.sources == _sources(folder):
            return list(memory.said)
    return None


@dataclass(frozen=True, kw_only=True)
class _Memory:
    """The content of source.json."""

    sources: Mapping[str, str]
    said: tuple[str, ...]


def _sources(folder: Path) -> dict[str, str]:
    """Return what decides the content of a report: the hashes of its tables, of its plan and of dlm, and versions."""
    here = [name for name in SOURCES if (folder / name).is_file()]
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in here}
    code = {"dlm": content_hash_of(PACKAGE), "configs": content_hash_of(configs_dir())}
    return {**files, **code, **{name: version(name) for name in LIBRARIES}}
