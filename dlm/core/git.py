"""Ask git which commit the running code comes from, and what has changed since that commit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dlm.core.paths import PACKAGE, configs_dir


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The commit that the code comes from, and how dlm/, configs/ and pyproject.toml differ from that commit."""

    sha: str
    changed: tuple[str, ...] = ()  # paths of changed and new files
    diff: str = ""

    def environment(self) -> dict[str, str]:
        """Return environment variables for jobs, which run a snapshot of the code outside any repository."""
        return {"DLM_GIT_SHA": self.sha, "DLM_GIT_DIRTY": str(int(bool(self.changed)))}


def code_origin(package: Path = PACKAGE, *, with_diff: bool = True) -> Origin | None:
    """Return the commit that a package comes from, and how its files differ from the commit.

    Args:
        package: The folder of the package.
        with_diff: Whether to compute the diff too.

    Returns:
        The commit and the differences; None if the package is in no repository or git is missing.
    """
    root = package.parent
    paths = [path for path in (package, configs_dir(), root / "pyproject.toml") if path.resolve().is_relative_to(root)]
    deciding = ("--", *map(str, paths))
    try:
        # The next line fails for a package that is installed inside another repository.
        _git(root, "ls-files", "--error-unmatch", str(package / "__init__.py"))
        sha = _git(root, "rev-parse", "HEAD")
        status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", *deciding)
    except OSError:
        return None
    except subprocess.CalledProcessError as error:
        if "dubious ownership" in str(error.stderr):
            _warn_once(
                f"dlm: warning: {root} belongs to somebody else, so git does not read it: the runs will not name their "
                f"commit, and changed code is not noticed (git config --global --add safe.directory {root})"
            )
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


@functools.cache
def _warn_once(line: str) -> None:
    print(line, file=sys.stderr)


def running_code() -> Origin | None:
    """Return the commit that the code of this process comes from; None if it is not in a repository.

    A submitted job runs a snapshot of the code; the environment of the job names the commit.
    """
    if "DLM_GIT_SHA" in os.environ:
        changed = ("unknown",) if os.environ.get("DLM_GIT_DIRTY") == "1" else ()
        return Origin(sha=os.environ["DLM_GIT_SHA"], changed=changed)
    return code_origin(with_diff=False)


def _git(folder: Path, *arguments: str, differs: bool = False) -> str:
    """Run git and return its output. With ``differs``, exit code 1 is no error: the compared files differ."""
    env = {**os.environ, "LC_ALL": "C"}  # messages are compared with their English words
    done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=False, env=env)
    if done.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(done.returncode, done.args, stderr=done.stderr)
    return done.stdout.rstrip("\n")
