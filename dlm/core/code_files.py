"""Say which files of dlm/ and configs/ are code. The snapshot of the code and the diff beside it follow this one rule.

A file that git tracks is code. A file that git does not know is code if dlm reads files of its kind. Dot files, dot
folders, bytecode and what git ignores are no code. Without git, every other file is code. A file that no commit holds
is refused if it looks like a secret, because the copies are often readable for others.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dlm.core.errors import UserError
from dlm.core.text import counted

KINDS = (".py", ".pyi", ".yaml", ".yml", ".j2")  # the files that dlm reads
MOST_BYTES = 10_000_000  # of all files that differ from the commit
NAMED = 10  # how many names a message lists
SHIPPED = ("configs", "sweeps")  # the folders that an installed wheel has inside the package

_SECRET_NAME = re.compile(
    r"\.(env|pem|key|p12|pfx)$|^(id_(rsa|dsa|ecdsa|ed25519).*|netrc|token\.(ya?ml|json|txt))$"
    r"|(^|[._-])(secrets?|credentials?|passwords?|passwd|(api|auth|access|hf|wandb)[._-]?(keys?|tokens?))([._-]|$)",
    re.IGNORECASE,
)
# Keys as providers write them, a key or a password whose value has 20 letters and digits, and URLs with a password.
_SECRET_CONTENT = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}"
    rb"|\bgithub_pat_\w{30,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{20,}|hooks\.slack\.com/services/\w+/"
    rb"|\bwandb_v\d+_\w{20,}|\bsk-[\w-]{30,}"
    rb"|\bglpat-[\w-]{20,}|\bpassword[ \t]+[0-9a-f]{40}\b"
    rb"|(?i:key|secret|token|password|passwd)[\"']?[ \t]*[:=][ \t]*[\"']?(?:local-)?(?=[A-Za-z/+]*\d)"
    rb"([A-Za-z0-9]{20,}|[A-Za-z0-9/+]{40})(?![\w/+.(\[-])"
    rb"|\bhttps?://(?=[A-Za-z_]*\d)\w{20,}@|\b[a-z]+://[^\s/:@\"']+:[^\s/:@\"'{}<>$]{4,}@[\w.-]"
)


@dataclass(frozen=True, kw_only=True)
class CodeFiles:
    """The files of a folder. Code is in ``tracked`` and ``new``."""

    tracked: list[Path] = field(default_factory=list)  # git tracks them
    new: list[Path] = field(default_factory=list)  # code that no commit holds
    left_out: list[Path] = field(default_factory=list)  # what is no code, except most of what git ignores
    missed: list[Path] = field(default_factory=list)  # modules of Python that git ignores


def code_files(folder: Path, *, without: Collection[str] = ()) -> CodeFiles:
    """Return the files of a folder by what is to become of them, in the order of their names.

    Args:
        folder: The folder dlm/ or configs/.
        without: Names of its subfolders that belong to another folder.
    """
    tracked = _listed(folder)
    ignored = _listed(folder, "--others", "--ignored", "--exclude-standard") if tracked else frozenset()
    found = CodeFiles()
    for path in _walk(folder, without):
        name = path.relative_to(folder).as_posix()
        is_read = path.suffix in KINDS
        if name in tracked:
            target = None if is_hidden(name) else found.tracked
        elif is_hidden(name):
            target = found.left_out if tracked and name not in ignored else None
        elif name in ignored:
            target = found.missed if path.suffix == ".py" else found.left_out if is_read else None
        else:
            target = found.new if is_read or not tracked else found.left_out
        if target is not None:
            target.append(path)
    return found


def is_hidden(name: str) -> bool:
    """Whether a path, relative to dlm/ or configs/, is a dot file or in a dot folder."""
    return any(part.startswith(".") for part in name.split("/"))


def check_uncommitted(paths: Iterable[Path]) -> None:
    """Raise UserError if one of these files, which differ from the last commit, looks like a secret or is too large."""
    files = [path for path in paths if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = max(files, key=lambda path: sizes[path])
        raise UserError(
            f"{counted(len(files), 'file')} of the code that no commit holds have {total / 1e6:.1f} MB, "
            f"{largest} alone {sizes[largest] / 1e6:.1f} MB: at most {MOST_BYTES / 1e6:g} MB are copied for jobs, so "
            "commit the file or move it out of dlm/ and configs/"
        )
    for path in files:
        if reason := _looks_secret(path):
            raise UserError(
                f"{path} looks like a secret ({reason}), and jobs run a copy of the code that others may read: move it "
                "out of dlm/ and configs/, let git ignore it, or commit it if it holds none"
            )


def names(paths: Sequence[Path | str], limit: int = NAMED) -> str:
    """Return the first names of files, and how many more there are."""
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(map(str, paths[:limit])) + more


def _looks_secret(path: Path) -> str | None:
    """Return what in a file looks like a secret, without the secret; None if nothing does."""
    if _SECRET_NAME.search(path.name):
        return "its name"
    content = path.read_bytes()
    found = _SECRET_CONTENT.search(content)
    return None if found is None else f"line {content.count(bytes([10]), 0, found.start()) + 1}"


def _listed(folder: Path, *options: str) -> frozenset[str]:
    """Return the names of `git ls-files`, relative to the folder; none without git or outside a repository."""
    command = ["git", "ls-files", "-z", *options]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return frozenset()
    return frozenset(os.fsdecode(name) for name in done.stdout.split(b"\0") if name)


def _walk(folder: Path, without: Collection[str]) -> Iterable[Path]:
    """Yield the files of a folder, also those behind links, without bytecode."""
    for place, folders, files in os.walk(folder, followlinks=True):
        is_top = Path(place) == folder
        folders[:] = sorted(one for one in folders if one != "__pycache__" and not (is_top and one in without))
        yield from (Path(place, name) for name in sorted(files) if not name.endswith(".pyc"))
