"""Move a finished data set into its folder.

A data set is built next to its target folder and then renamed, so an incomplete data set is never mistaken for a
complete one.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from pathlib import Path

from dlm.core.errors import UserError
from dlm.data.manifest import MANIFEST, Manifest, read_manifest


def move_into_place(building: Path, data_dir: Path, made: Manifest) -> None:
    """Rename ``building``, which holds the data set ``made``, to ``data_dir``.

    If ``data_dir`` already holds the same data, it stays as it is. Otherwise it is replaced, provided that it holds
    only files of a data set of this name.

    Raises:
        UserError: ``data_dir`` holds other files.
    """
    if data_dir.is_dir() and not any(data_dir.iterdir()):
        data_dir.rmdir()
    there = undamaged(data_dir)
    if there is not None and there.hash == made.hash:
        return
    if data_dir.is_dir() and all(_of_data_set(path.name, made.name) for path in data_dir.iterdir()):
        old = Path(tempfile.mkdtemp(dir=data_dir.parent, prefix=f".{data_dir.name}-old-"))
        os.rename(data_dir, old / data_dir.name)
        os.rename(building, data_dir)
        shutil.rmtree(old)
    elif data_dir.exists():
        raise UserError(f"{data_dir} exists and holds something else: move it away or choose another folder")
    else:
        os.rename(building, data_dir)


def undamaged(data_dir: Path) -> Manifest | None:
    """Return the manifest of ``data_dir``, or None if the data set is missing or damaged and must be made."""
    try:
        return read_manifest(data_dir)
    except UserError:
        return None


def _of_data_set(file: str, name: str) -> bool:
    return file == MANIFEST or fnmatch.fnmatchcase(file, f"*_{name}_*_*.bin")
