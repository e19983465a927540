"""snapshot: dlm/ and configs/ -> workdir/<sweep>/code/<hash>/. Called by submit; what submitted jobs run.

Hydra composes again where a job runs, so without a copy an edit made after submission would change the run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dlm.errors import UserError
from dlm.locate import PACKAGE, configs_dir

_LEFT_OUT = ("__pycache__", "*.pyc", ".*")


def snapshot_code(sweep_dir: Path, *, package: Path = PACKAGE, configs: Path | None = None) -> Path:
    """Copy dlm/ and configs/ once per content; the folder that goes first on PYTHONPATH.

    Raises UserError when the folder of that content no longer holds it.
    """
    code = sweep_dir.absolute() / "code"
    code.mkdir(parents=True, exist_ok=True)
    copy = Path(tempfile.mkdtemp(dir=code, prefix=".copying-"))
    try:
        # An installed wheel keeps its configs and sweeps inside the package.
        inside = shutil.ignore_patterns(*_LEFT_OUT, "configs", "sweeps")
        shutil.copytree(package, copy / "dlm", ignore=inside)
        shutil.copytree(configs or configs_dir(), copy / "configs", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        target = code / content_hash_of(copy)[:8]
        if not target.exists():
            copy.rename(target)
            target.chmod(0o755)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    if not content_hash_of(target).startswith(target.name):
        raise UserError(f"{target} was changed after it was written: delete it, and submit again")
    return target


def content_hash_of(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of all files; what running leaves behind is not counted."""
    whole = hashlib.sha256()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def git_environment(package: Path = PACKAGE) -> dict[str, str]:
    """DLM_GIT_SHA and DLM_GIT_DIRTY (0 or 1) of the code that was copied: a snapshot is no repository itself.

    Empty where the package is not in one, or git is not there.
    """
    try:
        sha = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", str(package), str(configs_dir()))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"DLM_GIT_SHA": sha, "DLM_GIT_DIRTY": str(int(bool(changed)))}


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()
