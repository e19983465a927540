"""Copy dlm/ and configs/ to workdir/<sweep>/code/<hash>/, from where submitted jobs import them.

Hydra composes the config of a job when the job runs. Without a copy, an edit after the submission would change the run.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

from dlm.core.errors import UserError
from dlm.core.files import write_if_changed
from dlm.core.git import Origin
from dlm.core.paths import PACKAGE, configs_dir

_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def snapshot_code(
    sweep_dir: Path, *, package: Path = PACKAGE, configs: Path | None = None, origin: Origin | None = None
) -> Path:
    """Copy the code, unless a copy with the same content exists.

    Args:
        sweep_dir: The folder of the sweep.
        package: The folder dlm/.
        configs: The folder configs/; None for the folder that dlm uses.
        origin: The commit of the code. The uncommitted changes are written to HASH.diff next to the copy.

    Returns:
        The folder of the copy, which must come first on PYTHONPATH. Its name is the first 8 digits of its content hash.

    Raises:
        UserError: The code cannot be copied, or an existing copy with this name was changed after it was written.
    """
    code = sweep_dir.absolute() / "code"
    code.mkdir(parents=True, exist_ok=True)
    copy = code / f".copying-{uuid.uuid4().hex[:8]}"
    copy.mkdir()
    try:
        # An installed wheel has configs/ and sweeps/ inside the package.
        shutil.copytree(package, copy / "dlm", ignore=shutil.ignore_patterns(*_LEFT_OUT, "configs", "sweeps"))
        shutil.copytree(configs or configs_dir(), copy / "configs", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        target = code / content_hash_of(copy)[:8]
        if not target.exists():
            copy.rename(target)
    except shutil.Error as error:  # holds (source, copy, reason) of every file, and no error number
        raise UserError(f"cannot copy the code of dlm to {code}: {error.args[0][0][2]}") from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    if not content_hash_of(target).startswith(target.name):
        raise UserError(f"{target} was changed after it was written: delete it, and submit again")
    if origin is not None and origin.diff:
        write_if_changed(target.with_name(f"{target.name}.diff"), origin.diff + "\n")
    return target


def content_hash_of(folder: Path) -> str:
    """Return the SHA-256 (hex) of the names and contents of all files except the bytecode that Python writes."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            name = path.relative_to(folder).as_posix()
            whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def uncommitted(origin: Origin) -> str:
    """Name the first files that differ from the last commit."""
    more = f" and {len(origin.changed) - 3} more" if len(origin.changed) > 3 else ""
    return f"not committed: {', '.join(origin.changed[:3])}{more}"


def check_clean(origin: Origin | None) -> None:
    """Raise UserError if the code differs from the last commit."""
    if origin is not None and origin.changed:
        raise UserError(
            f"{uncommitted(origin)}; commit first, or submit with --allow-dirty "
            "(ALLOW_DIRTY=1 for make, hydra.launcher.allow_dirty=true for Hydra), which keeps the diff beside the code"
        )
