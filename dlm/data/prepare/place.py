"""Move a finished data set into its folder.

A data set is built beside its folder and renamed into it, so that a half-made one is never taken for a whole one.
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

    The same data that are there already stay. Otherwise only files of this data set are replaced.

    Raises:
        UserError: ``data_dir`` holds something else.
    """
    building.chmod(0o755)
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
    """The manifest of ``data_dir``; None when the data set is missing or damaged, and is to be made."""
    try:
        return read_manifest(data_dir)
    except UserError:
        return None


def _of_data_set(file: str, name: str) -> bool:
    return file == MANIFEST or fnmatch.fnmatchcase(file, f"*_{name}_*_*.bin")
