"""Write files atomically, and append to and read logs of JSON lines.

Sweep folders are on shared cluster file systems, so there is no database. A file is written completely under a
temporary name, flushed to disk and renamed; a log only grows by complete lines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dlm.core import paths
from dlm.core.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # the numbers of an OSError when the disk is full or the quota is exhausted
# The numbers of an OSError while a network file system is away.
AWAY = (errno.ENOENT, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
PATIENCE_SEC = 60.0

T = TypeVar("T")


def patiently(folder: Path, write: Callable[[], T], *, patience_sec: float = PATIENCE_SEC) -> T:
    """Call `write`, which writes into an existing `folder`, and try again while the file system of `folder` is away.

    A folder that is missing counts as away, so nothing is written to the empty folder of an unmounted file system.

    Raises:
        OSError: The file system was away for longer than `patience_sec`, or something else is wrong.
    """
    deadline = time.monotonic() + patience_sec
    while True:
        try:
            folder.stat()
            return write()
        except OSError as error:
            if error.errno not in AWAY or time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def explain_os_error(error: OSError) -> str | None:
    """Describe in one line an error of the file system that the user can mend; None for any other error."""
    if error.errno in DISK_FULL and not error.filename:  # a write to an open file does not name it
        return f"{(error.strerror or 'no space left').lower()}: make room, and run the same command again"
    path = Path(str(error.filename)) if error.filename else None
    if path is None or not isinstance(error.filename, str | os.PathLike):
        return None
    has_vanished = error.errno == errno.ENOENT and not path.absolute().parent.is_dir()
    if error.errno in (*DENIED, *DISK_FULL) or (error.errno in AWAY and error.errno != errno.ENOENT) or has_vanished:
        why = "its folder does not exist" if has_vanished else (error.strerror or "no reason given").lower()
        is_ours = path.absolute().is_relative_to(paths.workdir())
        return f"cannot read or write {path}: {why}{' (DLM_WORKDIR names the folder of all sweeps)' if is_ours else ''}"
    return None


def sync_directory(path: Path) -> None:
    """Flush the directory ``path`` to disk, which makes renames inside it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def write_through(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Write ``path`` atomically: yield a temporary file, which becomes ``path`` at the end.

    A reader sees the old file or the new one, never a part of it. Without ``replaces``, UserError is raised if ``path``
    exists by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    # The umask decides who may read the file; tempfile would reserve it to its owner.
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield temporary
        os.fsync(handle)
        if replaces:
            os.replace(temporary, path)
        else:
            _link_new(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        os.close(handle)
    sync_directory(path.parent)


def _link_new(temporary: Path, path: Path) -> None:
    """Give a file its final name. Raises UserError if that name is taken, which a rename would not notice."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise UserError(f"{path} exists and is not overwritten: give another name or remove it") from error
    os.unlink(temporary)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with write_through(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_if_changed(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, unless the file already has this content."""
    if not (path.is_file() and path.read_text() == content):
        write_atomic(path, content)


def dump_json(value: Any) -> str:
    """Format a value as JSON, with keys in order of insertion and an indent of two spaces.

    NaN raises ValueError; a missing value must be None, which becomes null.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` atomically."""
    write_atomic(path, dump_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError, which names the file, if the file is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore or delete that file") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a log in a single write, so that lines of concurrent writers do not mix.

    If the log ends in an incomplete line, as after a crash, a line break is written first.
    """
    line = json.dumps(row, allow_nan=False) + "\n"
    with open(path, "a+b", buffering=0) as stream:
        stream.seek(max(stream.seek(0, os.SEEK_END) - 1, 0))
        is_torn = stream.read(1) not in (b"", b"\n")
        stream.write((b"\n" if is_torn else b"") + line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log, oldest first, without incomplete lines; an empty list if there is no log."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows
