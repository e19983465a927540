"""Ask git which commit the running code comes from, and what has changed since then."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dlm.core.paths import PACKAGE, configs_dir


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The commit that the code comes from, and how dlm/, configs/ and pyproject.toml differ from it."""

    sha: str
    changed: tuple[str, ...] = ()  # paths, new files included
    diff: str = ""

    def environment(self) -> dict[str, str]:
        """Environment variables for jobs, which run a snapshot of the code that is no repository."""
        return {"DLM_GIT_SHA": self.sha, "DLM_GIT_DIRTY": str(int(bool(self.changed)))}


def code_origin(package: Path = PACKAGE, *, with_diff: bool = True) -> Origin | None:
    """The commit that a package comes from, and how the files differ from it.

    Args:
        package: The folder of the package.
        with_diff: Whether to make the diff too.

    Returns:
        None where the package is in no repository, or git is missing.
    """
    root = package.parent
    paths = [path for path in (package, configs_dir(), root / "pyproject.toml") if path.resolve().is_relative_to(root)]
    deciding = ("--", *map(str, paths))
    try:
        # This fails for a package that is installed inside another repository.
        _git(root, "ls-files", "--error-unmatch", str(package / "__init__.py"))
        sha = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", *deciding)
    except (OSError, subprocess.CalledProcessError):
        return None
    lines = [line for line in status.split("\0") if line]
    changed = tuple(line[3:] for line in lines)
    if not with_diff:
        return Origin(sha=sha, changed=changed)
    new = [line[3:] for line in lines if line.startswith("??")]
    whole = ("--binary", "--no-ext-diff", "--no-color")
    diffs = [_git(root, "diff", "HEAD", *whole, *deciding)] if changed else []
    diffs += [_git(root, "diff", "--no-index", *whole, "/dev/null", name, differs=True) for name in new]
    return Origin(sha=sha, changed=changed, diff="\n".join(filter(None, diffs)))


def running_code() -> Origin | None:
    """The commit that the code of this process comes from.

    A submitted job runs a snapshot, and its environment names the commit. None where there is no repository.
    """
    if "DLM_GIT_SHA" in os.environ:
        changed = ("unknown",) if os.environ.get("DLM_GIT_DIRTY") == "1" else ()
        return Origin(sha=os.environ["DLM_GIT_SHA"], changed=changed)
    return code_origin(with_diff=False)


def _git(folder: Path, *arguments: str, differs: bool = False) -> str:
    """The output of git. With ``differs`` exit code 1 is no error: it means that there is a difference."""
    done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=False)
    if done.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(done.returncode, done.args)
    return done.stdout.rstrip("\n")
