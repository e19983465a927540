"""Ask git which commit the running code is of, and what has changed since."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dlm.core.paths import PACKAGE, configs_dir


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The commit behind the code, and what differs from it in dlm/, configs/ and pyproject.toml."""

    sha: str
    changed: tuple[str, ...] = ()  # paths, new files too
    diff: str = ""

    def environment(self) -> dict[str, str]:
        """For the jobs: a snapshot is no repository itself."""
        return {"DLM_GIT_SHA": self.sha, "DLM_GIT_DIRTY": str(int(bool(self.changed)))}


def code_origin(package: Path = PACKAGE, *, with_diff: bool = True) -> Origin | None:
    """The commit behind the code and what differs from it; None without a repository, or without git."""
    root = package.parent
    paths = [path for path in (package, configs_dir(), root / "pyproject.toml") if path.resolve().is_relative_to(root)]
    deciding = ("--", *map(str, paths))
    try:
        _git(root, "ls-files", "--error-unmatch", str(package / "__init__.py"))  # or an environment in another's folder
        sha = _git(root, "rev-parse", "HEAD")
        lines = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", *deciding).split(
            "\0"
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    changed = tuple(line[3:] for line in lines if line)
    if not with_diff:
        return Origin(sha=sha, changed=changed)
    new = [line[3:] for line in lines if line.startswith("??")]
    whole = ("--binary", "--no-ext-diff", "--no-color")
    diffs = [_git(root, "diff", "HEAD", *whole, *deciding)] if changed else []
    diffs += [_git(root, "diff", "--no-index", *whole, "/dev/null", name, differs=True) for name in new]
    return Origin(sha=sha, changed=changed, diff="\n".join(filter(None, diffs)))


def running_code() -> Origin | None:
    """Where the code of this process comes from: a submitted job runs a copy, whose origin its environment names."""
    if "DLM_GIT_SHA" in os.environ:
        changed = ("unknown",) if os.environ.get("DLM_GIT_DIRTY") == "1" else ()
        return Origin(sha=os.environ["DLM_GIT_SHA"], changed=changed)
    return code_origin(with_diff=False)


def _git(folder: Path, *arguments: str, differs: bool = False) -> str:
    """What git says; with ``differs`` exit code 1 means that there is a difference, as diff(1) says it."""
    done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=False)
    if done.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(done.returncode, done.args)
    return done.stdout.rstrip("\n")
