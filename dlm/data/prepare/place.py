"""Make the folder in which a data set is built, and move a finished data set into its own folder.

A data set is built next to its target folder and then renamed, so an incomplete data set is never mistaken for a
complete one.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
import tempfile
from pathlib import Path

from dlm.core.errors import UserError
from dlm.data.manifest import MANIFEST, Manifest, read_manifest


def make_building(data_dir: Path) -> Path:
    """Make the folder in which a data set is built, unless it is there already, and return it.

    Its name is always the same, so that a stopped preparation is found again. Raises UserError if somebody else may
    have put something in its place: a link, or a folder of another user.
    """
    building = data_dir.parent / f".{data_dir.name}.building"
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        building.mkdir()
    except FileExistsError:
        found = building.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise UserError(f"{building} is a link, and a data set is built in it: remove it") from None
        if stat.S_ISDIR(found.st_mode) and found.st_uid != os.geteuid():
            raise UserError(
                f"{building} belongs to another user, who alone can continue that preparation: choose another --out"
            ) from None
        if not stat.S_ISDIR(found.st_mode):
            raise
    return building


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
