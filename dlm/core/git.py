"""Ask git which commit the running code comes from, and what has changed since that commit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlm.core.code_files import SHIPPED, check_uncommitted, code_files, is_hidden
from dlm.core.paths import PACKAGE, configs_dir


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The commit that the code comes from, and how dlm/, configs/ and pyproject.toml differ from that commit."""

    sha: str
    changed: tuple[str, ...] = ()  # paths of changed and new files
    new: tuple[str, ...] = ()  # those of them that git does not track
    left_out: tuple[str, ...] = ()  # paths of files that no job gets
    diff: bytes = b""

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

    Raises:
        UserError: With ``with_diff``, a file that no commit holds looks like a secret, or the files are too large.
    """
    package, configs = package.resolve(), configs_dir().resolve()
    root = package.parent
    folders = [folder for folder in (package, configs) if folder.is_relative_to(root)]
    try:
        # The next line fails for a package that is installed inside another repository.
        _git(root, "ls-files", "--error-unmatch", str(package / "__init__.py"))
        sha = _git(root, "rev-parse", "HEAD").decode().strip()
        top = Path(os.fsdecode(_git(root, "rev-parse", "--show-toplevel").rstrip(b"\n")))
        edited = _edited(top, root, folders)
    except OSError:
        return None
    except subprocess.CalledProcessError as error:
        if b"dubious ownership" in error.stderr:
            _warn_once(
                f"dlm: warning: {root} belongs to somebody else, so git does not read it: the runs will not name their "
                f"commit, and changed code is not noticed (git config --global --add safe.directory {root})"
            )
        return None
    found = [code_files(folder, without=SHIPPED if folder == package else ()) for folder in folders]
    new = _names((path for files in found for path in files.new), top)
    left_out = _names((path for files in found for path in files.left_out), top)
    changed = (*edited, *new)
    diff = b""
    if with_diff and changed:
        check_uncommitted(top / name for name in changed)
        whole = ("--binary", "--no-ext-diff", "--no-color")
        diffs = [_git(top, "--literal-pathspecs", "diff", "HEAD", *whole, "--", *edited)] if edited else []
        diffs += [_git(top, "diff", "--no-index", *whole, "/dev/null", name, differs=True) for name in new]
        diff = b"".join(diffs)
    return Origin(sha=sha, changed=changed, new=new, left_out=left_out, diff=diff)


def _edited(top: Path, root: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the tracked files of the code that differ from the commit, relative to the repository."""
    places = [*folders, root / "pyproject.toml"]
    options = ("--name-only", "--no-renames", "-z")
    listed = _git(top, "--literal-pathspecs", "diff", "HEAD", *options, "--", *map(str, places))
    names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    return tuple(name for name in names if not any(_is_hidden_in(folder, top / name) for folder in folders))


def _is_hidden_in(folder: Path, path: Path) -> bool:
    return path.is_relative_to(folder) and is_hidden(path.relative_to(folder).as_posix())


def _names(paths: Iterable[Path], top: Path) -> tuple[str, ...]:
    return tuple(path.relative_to(top).as_posix() for path in paths)


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


def _git(folder: Path, *arguments: str, differs: bool = False) -> bytes:
    """Run git and return its output. With ``differs``, exit code 1 is no error: the compared files differ."""
    env = {**os.environ, "LC_ALL": "C"}  # messages are compared with their English words
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False, env=env)
    if done.returncode not in ((0, 1) if differs else (0,)):
        raise subprocess.CalledProcessError(done.returncode, done.args, stderr=done.stderr)
    return done.stdout
