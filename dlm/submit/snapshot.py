"""Copy dlm/ and configs/ to workdir/<sweep>/code/<hash>/, from where submitted jobs import them.

Hydra composes the config of a job when the job runs. Without a copy, an edit after the submission would change the run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from dlm.core.code_files import SHIPPED, check_uncommitted, code_files, names
from dlm.core.errors import UserError
from dlm.core.files import OWNER_ONLY, temporary_beside, write_atomic
from dlm.core.git import Origin
from dlm.core.paths import PACKAGE, configs_dir


def snapshot_code(
    sweep_dir: Path, *, package: Path = PACKAGE, configs: Path | None = None, origin: Origin | None = None
) -> Path:
    """Copy the code, unless a copy with the same content exists. What is code is said in ``dlm.core.code_files``.

    Args:
        sweep_dir: The folder of the sweep.
        package: The folder dlm/.
        configs: The folder configs/; None for the folder that dlm uses.
        origin: The commit of the code. The uncommitted changes are written to HASH.diff next to the copy, for the
            eyes of the owner only.

    Returns:
        The folder of the copy, which must come first on PYTHONPATH. Its name is the first 8 digits of its content hash.

    Raises:
        UserError: The code cannot be copied: a module would be missing, or a file that no commit holds looks like a
            secret or is too large. Or an existing copy with this name was changed after it was written.
    """
    code = sweep_dir.absolute() / "code"
    package, configs = package.resolve(), (configs or configs_dir()).resolve()
    if package.parent.parent == code.resolve() and configs == package.parent / "configs":  # it is such a copy already
        target = code / package.parent.name
    else:
        target = _copied(code, {"dlm": package, "configs": configs})
    if not content_hash_of(target).startswith(target.name):
        raise _changed(target)
    if origin is not None and origin.diff:
        write_atomic(target.with_name(f"{target.name}.diff"), origin.diff, mode=OWNER_ONLY)
    return target


def _copied(code: Path, folders: Mapping[str, Path]) -> Path:
    """Copy the code of each folder to a folder of this name below ``code``/HASH, and return ``code``/HASH."""
    files = {name: _files_to_copy(folder, without=SHIPPED if name == "dlm" else ()) for name, folder in folders.items()}
    copy = temporary_beside(code / "copying")
    copy.mkdir(parents=True)
    try:
        for name, paths in files.items():
            (copy / name).mkdir()
            for path in paths:
                to = copy / name / path.relative_to(folders[name])
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
        whole = content_hash_of(copy)
        target = code / whole[:8]
        if not target.exists():
            copy.rename(target)
        elif content_hash_of(target) != whole:  # others can make a folder with the same 8 digits
            raise _changed(target)
        else:
            _delete_bytecode(target)
    except (FileNotFoundError, shutil.SpecialFileError) as error:  # a link to nothing, a pipe
        raise UserError(f"cannot copy the code of dlm to {code}: {error}") from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return target


def _files_to_copy(folder: Path, *, without: Collection[str]) -> list[Path]:
    files = code_files(folder, without=without)
    if files.missed:
        raise UserError(
            f"git ignores {names(files.missed)}, so the copy of the code for jobs would lack it: commit it with "
            "`git add --force`, or move it out of dlm/ and configs/"
        )
    check_uncommitted(files.new)
    return [*files.tracked, *files.new]


def _changed(target: Path) -> UserError:
    return UserError(f"{target} was changed after it was written: delete it, and submit again")


def _delete_bytecode(copy: Path) -> None:
    """Delete the bytecode of this user's in a copy: Python would prefer it to the source, and no hash covers it.

    Another user's stays, who may write to the folder anyway. Python writes it again when the next job starts.
    """
    for path in copy.rglob("__pycache__/*.pyc"):
        with contextlib.suppress(FileNotFoundError):  # a job that runs replaces it at this moment
            if path.lstat().st_uid == os.geteuid():
                path.unlink()


def content_hash_of(folder: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of all files except the bytecode that Python writes.

    Links count too, of which a copy has none, and a .pyc file outside of __pycache__, which Python would import.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            whole.update(f"{path.relative_to(folder).as_posix()} is a link\n".encode())
        elif path.is_file() and path.parent.name != "__pycache__":
            name = path.relative_to(folder).as_posix()
            whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def uncommitted(origin: Origin) -> str:
    """Name the first files that differ from the last commit."""
    return f"not committed: {names(origin.changed, 3)}"


@functools.cache
def tell_of_untracked(origin: Origin | None) -> None:
    """Print which untracked files the copies of the code hold, and which are left out. The same is printed once."""
    if origin is not None and origin.new:
        print(f"dlm: jobs also get the files that git does not track: {names(origin.new)}", file=sys.stderr)
    if origin is not None and origin.left_out:
        print(
            f"dlm: jobs do not get these files, which are no code or which git ignores: {names(origin.left_out)}",
            file=sys.stderr,
        )


def check_clean(origin: Origin | None) -> None:
    """Raise UserError if the code differs from the last commit."""
    if origin is not None and origin.changed:
        raise UserError(
            f"{uncommitted(origin)}; commit first, or submit with --allow-dirty "
            "(ALLOW_DIRTY=1 for make, hydra.launcher.allow_dirty=true for Hydra), which keeps the diff beside the code"
        )
